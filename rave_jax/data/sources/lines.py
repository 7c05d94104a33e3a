"""JSON Lines by an index of where records start, kept beside the file.

The index is made in one pass and 8 bytes a record. When the file grows, only what is new is read, from the last block
on; a few blocks of the old part are read again to see that they are as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rave_jax.config import ConfigError
from rave_jax.data import flat
from rave_jax.data.places import CHUNK, File, Place
from rave_jax.data.sample import Part, SampleError
from rave_jax.data.sources import blocks
from rave_jax.data.sources.blocks import Blocks, together
from rave_jax.data.sources.files import check_text, checked, open_file, parse
from rave_jax.typing import Int, NpArray

VERSION = 1
LOOKED_AT = 4
"""Old blocks that are read again when a file has grown."""

_BLANK = np.zeros(256, bool)
_BLANK[list(b" \t\n\r\v\f")] = True


class JsonLines:
    """The objects of a JSON Lines file by index; only its index is held, mapped from a file.

    Raises:
        ConfigError: no such file, or no text.
    """

    def __init__(self, path: str | Path):
        self._file = open_file(path)
        self.path = self._file.place
        _check_lines(self.path, check_text(self._file))
        try:
            facts, arrays = _index(self._file)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        self._starts, self._size = arrays["starts"], self._file.size
        self._blank_at, self._blanks = arrays["blank_at"], arrays["blanks"]
        self._digests: list[str] = facts["digests"]
        self.fingerprint: str = together(self._digests)
        """Of the records in their order; blank lines do not count."""

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Blocks of records."""
        return parts_of(len(self), self._digests, str(self.path))

    def where(self, index: int) -> str:
        """File and line of a record, for messages."""
        found = int(np.searchsorted(self._blank_at, index, side="right"))
        return f"{self.path}:{index + 1 + (int(self._blanks[found - 1]) if found else 0)}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self) else self._size
        line, _, _ = read_record(self._file, start, end, self.where(index)).partition(b"\n")
        if len(line) > blocks.LONGEST:
            raise too_long(self.where(index), end - start)
        try:
            record = parse(line)
        except ValueError as error:
            raise SampleError(f"{self.where(index)}: not JSON: {error}") from error
        return checked(record, self.where(index))

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        """The records from `start` to `stop`; None for one that cannot be read."""
        return readable(self, start, stop)


def _check_lines(path: Place, start: bytes) -> None:
    """Raise ConfigError where a file starts as a JSON list over several lines does, or in UTF-16."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: expected JSON Lines in UTF-8, and this is UTF-16: save it as UTF-8")
    first, end, _ = start.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if first.startswith(b"[") and end and not first.rstrip().endswith(b"]"):
        raise ConfigError(
            f"{path}: expected JSON Lines, an object a line, and this is a JSON list: give its name the ending .json"
        )


def readable(records: Any, start: int, stop: int) -> Iterator[dict[str, Any] | None]:
    """Records of a range, None for each that cannot be read."""
    for index in range(start, stop):
        try:
            yield records[index]
        except SampleError:
            yield None


def read_record(file: File, start: int, end: int, where: str) -> bytes:
    """Bytes of a record, and no more than one byte above the limit.

    Raises:
        SampleError: they cannot be read, or the file is shorter than it was.
    """
    length = min(end - start, blocks.LONGEST + 1)
    try:
        found = file.read(start, length)
    except OSError as error:
        raise SampleError(f"{where}: cannot be read: {error.strerror or error}") from error
    if len(found) < length:
        raise SampleError(f"{where}: the file became shorter while it was in use: put it back as it was")
    return found


def too_long(where: str, length: int) -> SampleError:
    """The error of a record that is longer than the limit."""
    return SampleError(
        f"{where}: the record has {length:,} bytes, expected at most {blocks.LONGEST:,}: give pictures as files and "
        "name their paths"
    )


def parts_of(count: int, digests: list[str], data: str) -> tuple[Part, ...]:
    """Blocks of a file as parts."""
    lengths = [min(blocks.BLOCK, count - first) for first in range(0, max(count, 1), blocks.BLOCK)]
    return tuple(Part(length, found, data) for length, found in zip(lengths, digests, strict=True))


def _index(file: File) -> flat.Flat:
    """The index of a file: the one that is kept, grown where the file has grown, or a new one."""
    wanted = {"version": VERSION, "block": blocks.BLOCK, **flat.identity(file)}
    kept = flat.load(str(file.place), "lines")
    if kept is not None and {**kept.facts, "digests": 0} == {**wanted, "digests": 0}:
        return kept
    scan = _Scan(file)
    if kept is None or not scan.take_up(kept, wanted):
        scan = _Scan(file)
    return scan.index(wanted)


class _Scan:
    """One pass over a file, from its start or from the last block of an older index on."""

    def __init__(self, file: File):
        self._file, self._first = file, 0
        self._blocks = Blocks()
        self._blank_at: list[Int[NpArray, "N"]] = []
        self._before: tuple[Int[NpArray, "N"], list[str], int] = (np.zeros(0, np.int64), [], 0)

    def take_up(self, kept: flat.Flat, wanted: dict[str, Any]) -> bool:
        """Go on from an older index; False where the file did not only grow."""
        facts, starts, block = kept.facts, kept.arrays["starts"], blocks.BLOCK
        same = all(facts.get(name) == wanted[name] for name in ("version", "block", "name"))
        if not same or facts["size"] >= self._file.size or not len(starts):
            return False
        last = (len(starts) - 1) // block
        for number in {*np.linspace(0, last, LOOKED_AT).astype(int).tolist()}:
            stop = facts["size"] if number == last else int(starts[(number + 1) * block])
            if _digest(self._file, int(starts[number * block]), stop) != facts["digests"][number]:
                return False
        self._first = int(starts[last * block])
        blank_at, blanks = kept.arrays["blank_at"], kept.arrays["blanks"]
        counts = np.diff(blanks, prepend=0)[blank_at <= last * block]
        self._blank_at.append(np.repeat(blank_at[blank_at <= last * block], counts))
        self._before = (starts[: last * block], facts["digests"][:last], last * block)
        return True

    def index(self, wanted: dict[str, Any]) -> flat.Flat:
        """Read the file, and keep its index."""
        self.read(self._file.size)
        starts, digests, _ = self._before
        blank_at, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *self._blank_at]), return_counts=True)
        arrays = {
            "starts": np.concatenate([starts, self._blocks.starts]),
            "blank_at": blank_at,
            "blanks": np.cumsum(counts),
        }
        return flat.keep(
            str(self._file.place), "lines", {**wanted, "digests": [*digests, *self._blocks.digests]}, arrays
        )

    def read(self, stop: int) -> None:
        """Take up the lines from the start to `stop`."""
        held, at, long = b"", self._first, False
        for chunk in self._file.chunks(at, stop, CHUNK):
            if long:
                end = chunk.find(b"\n") + 1
                self._blocks.extend_long(chunk[:end] if end else chunk)
                at += end or len(chunk)
                if not end:
                    continue
                self._blocks.end_long()
                long, chunk = False, chunk[end:]
            data = held + chunk
            cut = data.rfind(b"\n") + 1
            self._lines(data[:cut], at)
            held, at = data[cut:], at + cut
            if len(held) > blocks.LONGEST:
                self._blocks.begin_long(at)
                self._blocks.extend_long(held)
                held, at, long = b"", at + len(held), True
        if long:
            self._blocks.end_long()
        self._lines(held, at)

    def _lines(self, data: bytes, at: int) -> None:
        if not data:
            return
        bytes_of = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(bytes_of == ord("\n"))
        if data.endswith(b"\n"):
            starts = np.concatenate([[0], ends[:-1] + 1])
            if not (_BLANK[bytes_of[starts]].any() or _BLANK[bytes_of[ends - 1]].any()):
                self._blocks.add_lines(at, starts, data)
                return
        lines = data.split(b"\n")
        if data.endswith(b"\n"):
            lines.pop()
        starts = np.concatenate([[0], ends + 1])[: len(lines)] + at
        records = [line.strip() for line in lines]
        if all(records):
            self._blocks.add(starts, records)
            return
        kept = np.fromiter(map(bool, records), bool, len(records))
        before = self._before[2] + self._blocks.count + np.cumsum(kept)
        self._blank_at.append(before[~kept])
        self._blocks.add(starts[kept], [record for record in records if record])

    @property
    def digests(self) -> list[str]:
        return self._blocks.digests


def _digest(file: File, start: int, stop: int) -> str:
    """The digest of the records of one block."""
    scan = _Scan(file)
    scan._first = start
    scan.read(stop)
    return together(scan.digests)
