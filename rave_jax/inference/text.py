"""The text of an answer while its tokens come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from rave_jax.config import ConfigError, require


def _bytes_of_characters() -> dict[str, int]:
    """The alphabet of byte-level BPE: bytes that print stand for themselves, the others for what follows U+00FF."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(b): b for b in printing} | {chr(0x100 + n): b for n, b in enumerate(others)}


ALPHABET = _bytes_of_characters()


class TokenBytes:
    """The bytes of a token's text: none for a special token, or for a row of the embedding table that no token has.

    Args:
        tokenizer: a fast tokenizer of transformers that is byte-level, as Qwen's.

    Raises:
        ConfigError: a tokenizer of another kind.
    """

    def __init__(self, tokenizer: Any):
        kind = type(tokenizer.backend_tokenizer.decoder).__name__
        if kind != "ByteLevel":
            raise ConfigError(f"the decoder of the tokenizer is {kind}, expected ByteLevel")
        self._tokenizer = tokenizer
        self._skipped = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __call__(self, token: int) -> bytes:
        name = None if token in self._skipped else self._tokenizer.convert_ids_to_tokens(int(token))
        if name is None:
            return b""
        try:
            return bytes(ALPHABET[character] for character in name)
        except KeyError:  # an added token is written as it is
            return name.encode()


class TextStream:
    """Text of an answer as its tokens come: whole characters only, and nothing from a stop string on.

    What `push` and `finish` give, put end to end, is what the tokenizer decodes from all tokens with special tokens
    skipped, up to the place where the first stop string begins; of several, that is the one that begins first. It does
    not depend on how the text is split over tokens. Text comes as soon as it is certain. The cost of a token does not
    grow with the answer.

    Bytes are put together here, and not by the `DecodeStream` of tokenizers: that one decodes everything since the last
    whole character again, so a long run of invalid bytes costs its length squared, and it does not tell what it holds
    back when the tokens end.

    Args:
        tokenizer: a fast tokenizer of transformers that is byte-level, as Qwen's.
        stop: strings that end the answer.

    Raises:
        ConfigError: a tokenizer of another kind, or a stop string that is empty.
    """

    stopped: bool
    """A stop string was met; what follows it is not shown."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._bytes = TokenBytes(tokenizer)
        strings = not isinstance(stop, str) and all(isinstance(s, str) and s for s in stop)
        require(strings, "stop", stop, "strings, none of them empty")
        self.stopped = False
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        # One mark for each stretch of bytes that is no character, where the decoder of tokenizers puts it too.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is certain now, "" after a stop string."""
        return self._show(self._decoder.decode(self._bytes(token)), last=False)

    def finish(self) -> str:
        """There are no more tokens: returns what was held back, an incomplete character as U+FFFD."""
        return self._show(self._decoder.decode(b"", final=True), last=True)

    def _show(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        certain = len(self._held) if last else self._open()
        begin = min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=-1)
        # One that begins later waits for one that may have begun before it.
        self.stopped = 0 <= begin <= certain
        if self.stopped:
            certain = begin
        piece = self._held[:certain]
        self._held = self._held[certain:]
        if piece:
            self._shown.append(piece)
        return piece

    def _open(self) -> int:
        """First place in the held text where a stop string may have begun that is not complete yet, or its length."""
        end = len(self._held)
        tails = range(max(0, end - self._longest + 1), end)
        return next((at for at in tails if any(s.startswith(self._held[at:]) for s in self._stop)), end)
