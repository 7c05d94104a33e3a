"""How single tokens are written on the page, those too that are no whole characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from rave_jax.inference.text import ALPHABET

Look = Literal["text", "special", "bytes", "none"]
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte that a SentencePiece vocabulary has no character for."""
SPACE = "▁"
"""How SentencePiece writes a space."""
LONGEST = 8
"""Most tokens that are taken for the pieces of one character."""


class Spelt(NamedTuple):
    """A token as it is written.

    Fields:
        text: its characters; bytes that are no whole character as hexadecimal numbers.
        look: text, a special token, a token that holds a piece of a character, or an id that no token has.
        name: what the vocabulary calls it.
        whole: of a piece, the characters that it makes up with its neighbours; "" where they make none.
        closes: is it the last piece of these?
    """

    text: str
    look: Look
    name: str
    whole: str = ""
    closes: bool = False


class Spelling:
    """Writes tokens of a fast tokenizer of transformers, of byte-level BPE or of SentencePiece."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self._byte_level = type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel"

    def __call__(self, tokens: Sequence[int]) -> list[Spelt]:
        """The tokens one by one."""
        names = [self._name(int(token)) for token in tokens]
        held = [None if name is None else self._bytes(int(i), name) for i, name in zip(tokens, names, strict=True)]
        spelt = [self._spelt(int(i), name, data) for i, name, data in zip(tokens, names, held, strict=True)]
        for first, stop, whole in _whole_characters(held, spelt):
            for index in range(first, stop):
                spelt[index] = spelt[index]._replace(whole=whole, closes=index == stop - 1)
        return spelt

    def _name(self, token: int) -> str | None:
        added = self._added.get(token)
        return self._tokenizer.convert_ids_to_tokens(token) if added is None else added.content

    def _bytes(self, token: int, name: str) -> bytes:
        if token in self._added:
            return name.encode()
        if self._byte_level:
            return b"".join(bytes([ALPHABET[c]]) if c in ALPHABET else c.encode() for c in name)
        found = BYTE.fullmatch(name)
        return bytes.fromhex(found[1]) if found else name.replace(SPACE, " ").encode()

    def _spelt(self, token: int, name: str | None, data: bytes | None) -> Spelt:
        if name is None or data is None:
            return Spelt(f"[{token}]", "none", "no token has this id")
        if token in self._added and self._added[token].special:
            return Spelt(name, "special", name)
        try:
            return Spelt(data.decode(), "text", name)
        except UnicodeDecodeError:
            return Spelt(data.decode("utf-8", "backslashreplace"), "bytes", name)


def _whole_characters(held: Sequence[bytes | None], spelt: Sequence[Spelt]) -> list[tuple[int, int, str]]:
    """(first, stop, text) of tokens side by side that hold pieces and are characters together."""
    found, first = [], 0
    while first < len(spelt):
        if spelt[first].look != "bytes":
            first += 1
            continue
        data = b""
        for stop in range(first, min(first + LONGEST, len(spelt))):
            if spelt[stop].look != "bytes":
                break
            data += held[stop] or b""
            try:
                found.append((first, stop + 1, data.decode()))
            except UnicodeDecodeError:
                continue
            first = stop
            break
        first += 1
    return found
