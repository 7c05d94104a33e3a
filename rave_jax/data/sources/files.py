"""Files of records: opened and parsed, with a fingerprint of what they hold, and what a file is that holds none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rave_jax.config import ConfigError, shown
from rave_jax.data.places import File, Place, open_place, place
from rave_jax.data.sample import SampleError
from rave_jax.data.sources.blocks import digest

BLOCK, MOST_BLOCKS = 2**20, 256
"""A fingerprint reads every byte of up to 256 blocks of 1 MB, and of more so many blocks spread evenly."""
BLOCKS_OF_FILE = 8
"""Blocks that the fingerprint of one of many files reads."""

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


def open_file(path: str | Place) -> File:
    """A regular file, open for reading.

    Raises:
        ConfigError: it is none, or it cannot be read.
    """
    if not str(path):
        raise ConfigError("path is empty, expected a file of records")
    found = place(path)
    try:
        return open_place(found)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{str(found)!r} cannot be read: {why}; expected a file of records") from error


def other_kind(start: bytes) -> str:
    """What a file is that starts like this, where it is no text; "" for text."""
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            return kind
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ""  # UTF-16, which JSON may be written in
    return "binary data" if b"\0" in start else ""


def check_text(file: File) -> bytes:
    """Up to 4096 bytes of the start of a text file.

    Raises:
        ConfigError: the file starts otherwise than a text does; says what it is.
    """
    start = file.read(0, 4096)
    if kind := other_kind(start):
        raise ConfigError(f"{file.place}: expected JSON, and this is {kind}")
    return start


def parse(data: bytes | str) -> Any:
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


def checked(record: Any, where: str) -> dict[str, Any]:
    """The record, which has to be an object.

    Raises:
        SampleError: it is something else.
    """
    if not isinstance(record, dict):
        raise SampleError(f"{where}: {type(record).__name__}, expected an object")
    return record


def fingerprint_of_files(places: Sequence[Place]) -> str:
    """A fingerprint of large files in this order: their sizes, their ends, and their bytes.

    All bytes count where the files have up to `MOST_BLOCKS` blocks together. Of more, each file gives a number of
    blocks, spread evenly from its start to its end, so that records in another order are seen and a terabyte is not
    read.

    Raises:
        OSError: one cannot be read.
    """
    seen = digest()
    each = max(1, MOST_BLOCKS // len(places))
    for where in places:
        file = open_place(where)
        seen.update(str(file.size).encode())
        for block in _some_blocks(file, each):
            seen.update(block)
        file.close()
    return seen.hexdigest()


def fingerprint_of_file(file: File) -> str:
    """A fingerprint of one large file: its size and up to `BLOCKS_OF_FILE` blocks, its ends among them.

    Raises:
        OSError: it cannot be read.
    """
    seen = digest(str(file.size).encode())
    for block in _some_blocks(file, BLOCKS_OF_FILE):
        seen.update(block)
    return seen.hexdigest()


def _some_blocks(file: File, most: int) -> Iterator[bytes]:
    if -(-file.size // BLOCK) <= most:
        yield from file.chunks(size=BLOCK)
        return
    for number in range(most + 1):
        # The last block ends with the file: the footer of a parquet file stands there.
        yield file.read((file.size - BLOCK) * number // most, BLOCK)
