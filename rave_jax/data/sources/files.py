"""Files of records: by index, with a fingerprint of what they hold, and what a file is that holds none."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rave_jax.config import ConfigError, shown
from rave_jax.data.sample import SampleError
from rave_jax.files import open_regular

BLOCK, MOST_BLOCKS = 2**20, 256
"""A fingerprint reads every byte of up to 256 blocks of 1 MB, and of more so many blocks spread evenly."""

MAGIC = {
    b"PAR1": "a parquet file: HfParquet reads those",
    b"ARROW1": "an Arrow file; save it as parquet, which HfParquet reads",
    b"\xff\xff\xff\xff": "an Arrow stream; save it as parquet, which HfParquet reads",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"(\xb5/\xfd": "compressed by zstd; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"SQLite format 3": "a database",
}


def digest(data: bytes = b"") -> Any:
    """The hash that fingerprints are made with; `update` and `hexdigest` as in hashlib."""
    return hashlib.blake2b(data, digest_size=16)


def open_file(path: Path) -> BinaryIO:
    """A regular file, open for reading.

    Raises:
        ConfigError: it is none, or it cannot be read.
    """
    try:
        return open_regular(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{str(path)!r} cannot be read: {why}; expected a file of records") from error


def other_kind(start: bytes) -> str:
    """What a file is that starts like this, where it is no text; "" for text."""
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            return kind
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ""  # UTF-16, which JSON may be written in
    return "binary data" if b"\0" in start else ""


def check_text(path: Path, file: BinaryIO) -> None:
    """Raise ConfigError, saying what the file is, unless it starts as a text does."""
    start = file.read(4096)
    file.seek(0)
    if kind := other_kind(start):
        raise ConfigError(f"{path}: expected JSON, and this is {kind}")


def parse(data: bytes) -> Any:
    """JSON, of which nothing may pass unread: a key given twice in one object is refused.

    Raises:
        ValueError: not JSON; says why.
    """
    try:
        return json.loads(data, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {shown(next(k for k in keys if keys.count(k) > 1))} twice")
    return found


class JsonLines:
    """The objects of a JSON Lines file by index; only where lines start is held in memory.

    Raises:
        ConfigError: no such file, or no text.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._starts, self._lengths, self._numbers = array("q"), array("q"), array("q")
        self._file = open_file(self.path)
        check_text(self.path, self._file)
        start, seen = 0, digest()
        for number, line in enumerate(self._file, start=1):
            if record := line.strip():
                self._starts.append(start)
                self._lengths.append(len(line))
                self._numbers.append(number)
                seen.update(record + b"\n")
            start += len(line)
        self.fingerprint: str = seen.hexdigest()
        """Of the records in their order; blank lines do not count."""

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """File and line of a record, for messages."""
        return f"{self.path}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        # pread keeps no position, so threads may read at once.
        try:
            line = os.pread(self._file.fileno(), self._lengths[index], self._starts[index])
        except OSError as error:
            raise SampleError(f"{self.where(index)}: cannot be read: {error.strerror or error}") from error
        try:
            record = parse(line)
        except ValueError as error:
            raise SampleError(f"{self.where(index)}: not JSON: {error}") from error
        return _checked(record, self.where(index))


class JsonList:
    """The objects of a JSON file that holds one list.

    Raises:
        ConfigError: no such file, or no list in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open_file(self.path) as file:
            check_text(self.path, file)
            data = file.read()
        self.fingerprint: str = digest(data).hexdigest()
        """Of the whole file."""
        try:
            self._records = parse(data)
        except ValueError as error:
            lines = "; JSON Lines, an object a line, belong in a file that ends in .jsonl" if b"}\n" in data else ""
            raise ConfigError(f"{self.path}: not JSON: {error}{lines}") from error
        if not isinstance(self._records, list):
            raise ConfigError(f"{self.path}: holds {type(self._records).__name__}, expected a list of records")

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """File and record number, for messages."""
        return f"{self.path}[{index}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _checked(self._records[index], self.where(index))


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise SampleError(f"{where}: {type(record).__name__}, expected an object")
    return record


def open_records(path: str | Path) -> JsonLines | JsonList:
    """Records of a `.jsonl` file, or of a JSON file that holds a list.

    Raises:
        ConfigError: no such file, or one that holds no records.
    """
    return JsonLines(path) if Path(path).suffix == ".jsonl" else JsonList(path)


def fingerprint_of_files(paths: Sequence[Path]) -> str:
    """A fingerprint of large files in this order: their sizes, their ends, and their bytes.

    All bytes count where the files have up to `MOST_BLOCKS` blocks together. Of more, each file gives a number of
    blocks, spread evenly from its start to its end, so that records in another order are seen and a terabyte is not
    read.
    """
    seen = digest()
    each = max(1, MOST_BLOCKS // len(paths))
    for path in paths:
        size = path.stat().st_size
        seen.update(str(size).encode())
        blocks = -(-size // BLOCK)
        with path.open("rb") as file:
            if blocks <= each:
                while block := file.read(BLOCK):
                    seen.update(block)
                continue
            for number in range(each + 1):
                # The last block ends with the file: the footer of a parquet file stands there.
                file.seek((size - BLOCK) * number // each)
                seen.update(file.read(BLOCK))
    return seen.hexdigest()
