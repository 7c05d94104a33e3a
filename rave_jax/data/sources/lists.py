"""A JSON file of one list by an index of where its elements start, kept beside the file.

The file is read in pieces. Quotes, brackets and commas are found by numpy; each element is parsed once, when the index
is made, so that what is no JSON is refused as `json.loads` refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rave_jax.config import ConfigError
from rave_jax.data import flat
from rave_jax.data.places import CHUNK, File
from rave_jax.data.sample import Part, SampleError
from rave_jax.data.sources import blocks
from rave_jax.data.sources.blocks import Blocks, digest
from rave_jax.data.sources.files import check_text, checked, open_file, parse
from rave_jax.data.sources.lines import parts_of, read_record, readable, too_long
from rave_jax.typing import Bool, Int, NpArray, UInt8

VERSION = 1
BLANKS = b" \t\n\r"
"""What JSON takes as blank."""
BOM, WIDE = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
"""How UTF-8 may start, and how UTF-16 and UTF-32 do."""

_SIGNS = np.zeros(256, bool)
_SIGNS[list(b'"[]{},')] = True
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


def open_list(path: str | Path) -> JsonList | HeldList:
    """The objects of a JSON file that holds one list.

    Raises:
        ConfigError: no such file, or no list in it.
    """
    file = open_file(path)
    check_text(file)
    return HeldList(file) if file.read(0, 2) in WIDE else JsonList(file)


class JsonList:
    """The objects of a list in UTF-8; only its index is held, mapped from a file.

    Raises:
        ConfigError: the file holds no list.
    """

    def __init__(self, file: File):
        self._file, self.path = file, file.place
        try:
            facts, arrays = self._index()
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        self._starts, self._digests = arrays["starts"], facts["digests"]
        self.fingerprint: str = facts["whole"]
        """Of the whole file."""

    def __len__(self) -> int:
        return max(0, len(self._starts) - 1)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Blocks of records."""
        return parts_of(len(self), self._digests, str(self.path))

    def where(self, index: int) -> str:
        """File and record number, for messages."""
        return f"{self.path}[{index}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = int(self._starts[index]), int(self._starts[index + 1]) - 1
        found = read_record(self._file, start, end, self.where(index))
        if len(found) > blocks.LONGEST:
            raise too_long(self.where(index), end - start)
        try:
            return checked(_parsed(found), self.where(index))
        except ValueError as error:
            if isinstance(error, SampleError):
                raise
            raise SampleError(f"{self.where(index)}: not JSON: {error}") from error

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        """The records from `start` to `stop`; None for one that cannot be read."""
        return readable(self, start, stop)

    def _index(self) -> flat.Flat:
        wanted = {"version": VERSION, "block": blocks.BLOCK, **flat.identity(self._file)}
        kept = flat.load(str(self.path), "list")
        if kept is not None and {name: kept.facts.get(name) for name in wanted} == wanted:
            return kept
        try:
            scan = _Scan(self._file)
        except ValueError as error:
            raise _refused(self._file, str(error)) from error
        facts = {**wanted, "digests": scan.blocks.digests, "whole": scan.whole}
        return flat.keep(str(self.path), "list", facts, {"starts": scan.starts})


class HeldList:
    """The objects of a list in UTF-16 or UTF-32, which are held in memory."""

    def __init__(self, file: File):
        self.path, data = file.place, b"".join(file.chunks())
        self.fingerprint: str = digest(data).hexdigest()
        self._records = _whole(file, data)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The file is one part."""
        return (Part(len(self), self.fingerprint, str(self.path)),)

    def where(self, index: int) -> str:
        """File and record number, for messages."""
        return f"{self.path}[{index}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return checked(self._records[index], self.where(index))

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        """The records from `start` to `stop`; None for one that cannot be read."""
        return readable(self, start, stop)


def _whole(file: File, data: bytes) -> list[Any]:
    """The list that the bytes of a file hold.

    Raises:
        ConfigError: they hold none.
    """
    try:
        found = parse(data)
    except ValueError as error:
        lines = "; JSON Lines, an object a line, belong in a file that ends in .jsonl" if b"}\n" in data else ""
        raise ConfigError(f"{file.place}: not JSON: {error}{lines}") from error
    if not isinstance(found, list):
        raise ConfigError(f"{file.place}: holds {type(found).__name__}, expected a list of records")
    return found


def _refused(file: File, why: str) -> ConfigError:
    """The error of a file that holds no list; of one that is not too large, what the parser says of all of it."""
    if file.size <= blocks.LONGEST:
        try:
            _whole(file, b"".join(file.chunks()))
        except ConfigError as error:
            return error
    return ConfigError(f"{file.place}: not JSON: {why}")


def _parsed(element: bytes) -> Any:
    # As text: of bytes, `json` would guess the encoding of each element.
    return parse(element.decode("utf-8", "surrogatepass"))


class _Scan:
    """One pass over a file.

    Attributes:
        starts: byte at which each element begins, and one behind the byte at which the list ends; empty for no element.
        blocks: digests of the elements.
        whole: digest of the file.

    Raises:
        ValueError: it holds no list; says where.
        OSError: it cannot be read.
    """

    def __init__(self, file: File):
        self.blocks, self._file = Blocks(), file
        self._in_text = self._escaped = False
        self._depth = 0
        seen, held, at, long, done, begun = digest(), b"", 0, False, False, False
        if file.read(0, len(BOM)) == BOM:
            seen.update(BOM)
            at = len(BOM)
        for chunk in file.chunks(at, None, CHUNK):
            seen.update(chunk)
            if not begun:
                held += chunk
                inner = held.lstrip(BLANKS)
                if not inner:
                    at, held = at + len(held), b""
                    continue
                if not inner.startswith(b"["):
                    raise ValueError(f"expected a list, which starts with [, found {inner[:20]!r}")
                at, chunk, held = at + len(held) - len(inner) + 1, inner[1:], b""
                begun, self._depth = True, 1
            if done:
                _only_blank(chunk, self._file.size)
                continue
            cuts, end = self._cuts(chunk)
            first = 0
            for cut in cuts.tolist():
                self._element(held + chunk[first:cut], at, long, cut == end)
                at, held, long, first = at + len(held) + cut - first + 1, b"", False, cut + 1
            if end is not None:
                _only_blank(chunk[end + 1 :], self._file.size)
                done = True
                continue
            held += chunk[first:]
            if len(held) > blocks.LONGEST:
                if not long:
                    self.blocks.begin_long(at)
                self.blocks.extend_long(held)
                at, held, long = at + len(held), b"", True
        if not done:
            raise ValueError("it is cut off: the list does not end" if begun else "the file is empty")
        self.whole: str = seen.hexdigest()
        found = np.append(self.blocks.starts, at)
        self.starts: Int[NpArray, "N"] = found if self.blocks.count else found[:0]

    def _element(self, raw: bytes, at: int, long: bool, last: bool) -> None:
        if long:
            self.blocks.extend_long(raw)
            self.blocks.end_long()
            return
        text = raw.strip(BLANKS)
        if not text and last and not self.blocks.count:
            return  # [] holds nothing
        try:
            _parsed(text)
        except ValueError as error:
            raise ValueError(f"record {self.blocks.count} (from byte {at} on): {error}") from error
        self.blocks.add(np.array([at], np.int64), [text])

    def _cuts(self, chunk: bytes) -> tuple[Int[NpArray, "N"], int | None]:
        """Where elements of the list end in a piece of the file, and where the list itself ends."""
        data = np.frombuffer(chunk, np.uint8)
        places = np.flatnonzero(_SIGNS[data])
        signs = data[places]
        quotes = signs == ord('"')
        if self._escaped or b"\\" in chunk:
            quotes &= ~self._behind_escape(data, places)
        in_text = (np.cumsum(quotes) + self._in_text) % 2 == 1
        outside = ~in_text & (signs != ord('"'))
        places, signs = places[outside], signs[outside]
        depth = self._depth + np.cumsum(_STEP[signs], dtype=np.int64)
        if len(in_text):
            self._in_text = bool(in_text[-1])
        ends = np.flatnonzero(depth <= 0)
        if len(ends):
            end = ends[0]
            self._depth = 0
            cuts = places[: end + 1][(signs[: end + 1] == ord(",")) & (depth[: end + 1] == 1)]
            return np.append(cuts, places[end]), int(places[end])
        if len(depth):
            self._depth = int(depth[-1])
        return places[(signs == ord(",")) & (depth == 1)], None

    def _behind_escape(self, data: UInt8[NpArray, "N"], places: Int[NpArray, "M"]) -> Bool[NpArray, "M"]:
        """Which places are escaped: behind a run of backslashes of odd length."""
        slashes = np.flatnonzero(data == ord("\\"))
        escaped = [0] if self._escaped and (not len(slashes) or slashes[0] != 0) else []
        runs = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
        first = slashes[runs]
        last = slashes[np.append(runs[1:], len(slashes)) - 1] if len(slashes) else slashes
        lengths = last - first + 1
        if len(first) and first[0] == 0 and self._escaped:
            lengths[0] -= 1
        behind = last[lengths % 2 == 1] + 1
        self._escaped = bool(len(behind)) and int(behind[-1]) == len(data)
        return np.isin(places, np.concatenate([escaped, behind]))


def _only_blank(data: bytes, size: int) -> None:
    if data.strip(BLANKS):
        raise ValueError(f"extra data behind the list, in a file of {size} bytes")
