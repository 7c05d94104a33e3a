"""Records of a text file in blocks, each with a digest: what a scan of the file collects for its index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rave_jax.typing import Int, NpArray

BLOCK = 2**16
"""Records of a block. Blocks are the parts of a file that stay valid when it grows."""
LONGEST = 2**26
"""Bytes of the longest record that is read; a longer one is never held in memory."""


def digest(data: bytes = b"") -> Any:
    """The hash that fingerprints are made with; `update` and `hexdigest` as in hashlib."""
    return hashlib.blake2b(data, digest_size=16)


class Blocks:
    """Where records start and what blocks of them hold.

    A record counts without the blanks around it, and with a line end behind it.
    """

    def __init__(self) -> None:
        self.count = 0
        self._starts: list[Int[NpArray, "N"]] = []
        self._digests: list[str] = []
        self._open, self._in_open = digest(), 0
        self._held = b""
        self._begun = False

    def add(self, starts: Int[NpArray, "N"], records: Sequence[bytes]) -> None:
        """Take up whole records.

        Args:
            starts: byte at which each begins.
            records: without blanks around them.
        """
        self._starts.append(starts)
        self.count += len(records)
        first = 0
        while first < len(records):
            some = records[first : first + BLOCK - self._in_open]
            self._open.update(b"\n".join(some) + b"\n")
            self._count(len(some))
            first += len(some)

    def add_lines(self, at: int, starts: Int[NpArray, "N"], lines: bytes) -> None:
        """Take up whole records that stand as they count: no blanks around them, a line end behind each.

        Args:
            at: byte at which the first begins.
            starts: where each begins in `lines`.
            lines: all of them.
        """
        self._starts.append(starts + at)
        self.count += len(starts)
        view, first = memoryview(lines), 0
        while first < len(starts):
            last = min(len(starts), first + BLOCK - self._in_open)
            self._open.update(view[int(starts[first]) : int(starts[last]) if last < len(starts) else len(lines)])
            self._count(last - first)
            first = last

    def begin_long(self, start: int) -> None:
        """Take up a record that is longer than `LONGEST`; `extend_long` brings its pieces, `end_long` its end."""
        self._starts.append(np.array([start], np.int64))
        self.count += 1
        self._held, self._begun = b"", False

    def extend_long(self, piece: bytes) -> None:
        """The next piece of a long record."""
        piece = piece if self._begun else piece.lstrip()
        if inner := piece.rstrip():
            self._open.update(self._held)
            self._open.update(inner)
            self._held, self._begun = piece[len(inner) :], True
        else:
            self._held = (self._held + piece)[:LONGEST]

    def end_long(self) -> None:
        """The long record is over."""
        self._open.update(b"\n")
        self._count(1)

    def _count(self, records: int) -> None:
        self._in_open += records
        if self._in_open == BLOCK:
            self._digests.append(self._open.hexdigest())
            self._open, self._in_open = digest(), 0

    @property
    def starts(self) -> Int[NpArray, "N"]:
        """Byte at which each record begins."""
        return np.concatenate([np.zeros(0, np.int64), *self._starts])

    @property
    def digests(self) -> list[str]:
        """Of each block, the last of which may be short; of no records, one."""
        full = self._in_open or not self._digests
        return [*self._digests, self._open.hexdigest()] if full else list(self._digests)


def together(digests: Sequence[str]) -> str:
    """The fingerprint of blocks in their order; of one block, its own."""
    return digests[0] if len(digests) == 1 else digest("\n".join(digests).encode()).hexdigest()
