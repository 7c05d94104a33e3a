"""Arrays in one file that is mapped into memory: indices of data, kept beside it.

An index names its kind and the file it is of, with its size, its time and its ends. One of another kind or file, of
another version of the format, or a damaged one is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rave_jax.data.beside import folder_beside, write_whole
from rave_jax.data.places import File
from rave_jax.typing import NpArray

log = logging.getLogger(__name__)

MAGIC = b"RAVEIDX1"
START = struct.Struct("<8sII")
"""The magic, the length of the header and its checksum."""
ALIGNED = 64
END = 4096
"""Bytes of a file's start and of its end that tell it from another of the same size and time."""
LONGEST_NAME = 100


class Flat(NamedTuple):
    """An index.

    Fields:
        facts: JSON-ready.
        arrays: by name, mapped where the index lies in a file.
    """

    facts: dict[str, Any]
    arrays: dict[str, NpArray]


def identity(file: File) -> dict[str, Any]:
    """What tells a file from others and from its own earlier states: name, size, stamp and its ends.

    Raises:
        OSError: it cannot be read.
    """
    ends = hashlib.blake2b(file.read(0, END) + file.read(max(0, file.size - END), END), digest_size=16)
    return {"name": file.place.name, "size": file.size, "stamp": file.stamp, "ends": ends.hexdigest()}


def load(data: str, kind: str) -> Flat | None:
    """The index of this kind that is kept for a file or folder; None where there is none that is whole."""
    try:
        path = folder_beside(data) / _name(data, kind)
        with path.open("rb") as file:
            magic, length, checksum = START.unpack(file.read(START.size))
            header = file.read(length)
            size = file.seek(0, 2)
        if magic != MAGIC or zlib.crc32(header) != checksum:
            return None
        found = json.loads(header)
        if found["kind"] != kind:
            return None
        arrays = {}
        for name, kind_of, count, offset, crc in found["arrays"]:
            dtype = np.dtype(kind_of)
            if offset + count * dtype.itemsize > size:
                return None
            mapped = np.memmap(path, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)
            if zlib.crc32(mapped.data if count else b"") != crc:
                return None
            arrays[name] = mapped
        return Flat(found["facts"], arrays)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def keep(data: str, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, NpArray]) -> Flat:
    """Keep an index for a file or folder of data, and give it as `load` does.

    Where it cannot be written it stays in memory, and one line says so.
    """
    try:
        write_whole(folder_beside(data) / _name(data, kind), lambda file: _write(file, kind, facts, arrays))
    except OSError as error:
        log.warning("%s: its index is not kept (%s) and is made again by each run", data, error.strerror or error)
        return Flat(dict(facts), dict(arrays))
    return load(data, kind) or Flat(dict(facts), dict(arrays))


def _write(file: BinaryIO, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, NpArray]) -> None:
    def header(offset: int) -> bytes:
        rows = []
        for name, array in arrays.items():
            rows.append([name, array.dtype.str, len(array), offset, zlib.crc32(np.ascontiguousarray(array).data)])
            offset += -(-array.nbytes // ALIGNED) * ALIGNED
        return json.dumps({"kind": kind, "facts": dict(facts), "arrays": rows}).encode()

    # Offsets stand in the header, whose length they change: there is room for their digits.
    first = -(-(START.size + len(header(0)) + 20 * len(arrays)) // ALIGNED) * ALIGNED
    found = header(first).ljust(first - START.size)
    file.write(START.pack(MAGIC, len(found), zlib.crc32(found)) + found)
    for array in arrays.values():
        file.write(np.ascontiguousarray(array).data)
        file.write(b"\0" * (-array.nbytes % ALIGNED))


def _name(data: str, kind: str) -> str:
    name = data.rstrip("/").rpartition("/")[2]
    if len(name.encode()) > LONGEST_NAME:
        name = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    return f"{name}.{kind}.index"
