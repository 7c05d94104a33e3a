"""Token ids of a text in which some special tokens are meant and others are only words.

The template of a conversation writes special tokens. Whoever writes a message can type the same strings, and there they
are text. Before a text comes here, each special token of the template is replaced by a private character; what is still
spelled out was typed. A copy of the tokenizer knows special tokens by these characters alone, so normalisation,
splitting and merging at their borders are those of the tokenizer itself.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from rave_jax.config import ConfigError
from rave_jax.data.sample import SampleError
from rave_jax.typing import Int, NpArray

FIRST = 0xF0000
"""The first of the private characters (Unicode plane 15) that stand for special tokens."""


HALF_PAIR = re.compile("[\ud800-\udfff]")
_COPYING = threading.Lock()
"""Held while a tokenizer is copied. Of the module, so that a tokenizer can be pickled."""


class Encoded(NamedTuple):
    """Tokens and where each begins in the text, counted in characters."""

    ids: list[int]
    starts: Int[NpArray, "N"]


class LiteralTokenizer:
    """A tokenizer that can tell a special token from its spelling.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        special = {token.content: number for number, token in sorted(added.items()) if token.special and token.content}
        self.ids: dict[str, int] = {chr(FIRST + n): number for n, number in enumerate(special.values())}
        """Id of the token that each private character stands for."""
        self.spelled: dict[str, str] = {chr(FIRST + n): content for n, content in enumerate(special)}
        """How that token is spelled."""
        self._private = {content: character for character, content in self.spelled.items()}
        longest_first = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._literal: Tokenizer | None = None
        self._cuts_spaces = self._does_cut_spaces()

    @property
    def leading(self) -> list[int]:
        """Ids that the tokenizer puts in front of a text if it is asked for special tokens, such as that of `<s>`.

        Raises:
            ConfigError: it puts others behind a text.
        """
        plain, whole = (self._backend.encode("a", add_special_tokens=asked).ids for asked in (False, True))
        if whole[len(whole) - len(plain) :] != plain:
            added = self._backend.decode(whole[-1:], skip_special_tokens=False)
            raise ConfigError(f"the tokenizer puts {added!r} behind every text; expected nothing behind a prompt")
        return whole[: len(whole) - len(plain)]

    def private(self, token: str) -> str:
        """The private character of a special token."""
        return self._private[token]

    def matches(self, text: str, start: int, stop: int) -> Iterator[re.Match[str]]:
        """Where special tokens are spelled out between two places of a text, in order."""
        return self._pattern.finditer(text, start, stop)

    def found(self, text: str) -> list[str]:
        """The special tokens that are spelled out in a text, in order."""
        return self._pattern.findall(text)

    def replaced(self, text: str, by: Mapping[str, str]) -> str:
        """The text with each special token that it spells out replaced."""
        return self._pattern.sub(lambda match: by[match[0]], text)

    def encode(self, text: str) -> Encoded:
        """Tokens of a text; every special token that is spelled out is one.

        Raises:
            SampleError: the text holds half a surrogate pair.
        """
        return self._encode(self._backend, text)

    def encode_literal(self, text: str) -> Encoded:
        """Tokens of a text in which private characters are special tokens and spellings are words.

        Raises:
            SampleError: the text holds half a surrogate pair, or the tokenizer cannot be copied.
        """
        with _COPYING:
            if self._literal is None:
                self._literal = self._copy()
        return self._encode(self._literal, text)

    def _encode(self, backend: Tokenizer, text: str) -> Encoded:
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        except TypeError as error:
            half = HALF_PAIR.search(text)
            place = half.start() if half else 0
            raise SampleError(f"a text is not valid Unicode: {text[max(0, place - 20) : place + 20]!r}") from error
        bounds = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        starts = bounds[:, 0]
        if self._cuts_spaces and len(starts):
            before = np.concatenate([[0], np.maximum.accumulate(bounds[:, 1])[:-1]])
            starts = np.minimum(starts, before)
        return Encoded(encoding.ids, np.maximum.accumulate(starts) if len(starts) else starts)

    def _does_cut_spaces(self) -> bool:
        """Are the spaces before a word left out of its offsets, although they are in its token?"""
        encoding = self._backend.encode("a b", add_special_tokens=False)
        last = encoding.ids[-1:]
        return encoding.offsets[-1:] == [(2, 3)] and self._backend.decode(last, skip_special_tokens=False)[:1] == " "

    def _copy(self) -> Tokenizer:
        """The tokenizer with its special tokens renamed to private characters, under the same ids."""
        data = json.loads(self._backend.to_str())
        for token in data["added_tokens"]:
            if token["special"]:
                token["content"] = self._private.get(token["content"], token["content"])
        model = data["model"]
        vocab = model.get("vocab")
        if isinstance(vocab, dict):
            model["vocab"] = {self._private.get(piece, piece): number for piece, number in vocab.items()}
            if merges := model.get("merges"):
                # A special token may also be what pieces of text merge into; its spelling stays in pieces.
                pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
                kept = [n for n, (a, b) in enumerate(pairs) if self._private.keys().isdisjoint((a, b, a + b))]
                model["merges"] = [merges[n] for n in kept]
        elif isinstance(vocab, list):
            model["vocab"] = [[self._private.get(piece, piece), score] for piece, score in vocab]
        if model.get("unk_token") in self._private:
            model["unk_token"] = self._private[model["unk_token"]]
        try:
            copy = Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # tokenizers raises no narrower kind
            raise SampleError(f"special tokens cannot be read as text with this tokenizer: {error}") from error
        if {character: copy.token_to_id(character) for character in self.ids} != self.ids:
            raise SampleError("special tokens cannot be read as text with this tokenizer: their ids change")
        return copy
