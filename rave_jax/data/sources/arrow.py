"""Arrow files as `datasets` saves them: record batches in a stream, found by the headers of its messages.

A message is its length, a header (a flatbuffer, of which two numbers are read here) and a body. The body is passed over
when batches are counted, and read when a row of it is asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rave_jax.config import ConfigError
from rave_jax.data import flat
from rave_jax.data.places import File, Place, open_place
from rave_jax.data.sources.files import fingerprint_of_file, open_file, other_kind

VERSION = 1
CONTINUES = 0xFFFFFFFF
SCHEMA, DICTIONARY, BATCH = 1, 2, 3
"""Kinds of messages, as Arrow's Message.fbs numbers them."""
MOST_ROWS = 2**31 - 1
"""Of a batch."""


class ArrowFile:
    """A file of record batches, as a `TableFile`.

    Attributes:
        place: where it is.
        groups: rows of each batch.
        fingerprint: of what the file holds.

    Raises:
        ConfigError: it is no such file, or it is cut off.
    """

    def __init__(self, where: Place):
        self.place = where
        file = open_file(where)
        try:
            self._is = flat.identity(file)
            wanted = {"version": VERSION, **self._is}
            found = flat.load(str(where), "arrow")
            if found is None or {name: found.facts.get(name) for name in wanted} != wanted:
                arrays = _batches(file)
                facts = {**wanted, "fingerprint": fingerprint_of_file(file)}
                found = flat.keep(str(where), "arrow", facts, arrays)
            self._offsets, rows = found.arrays["offsets"], found.arrays["rows"]
            self.groups: list[int] = rows.tolist()
            self.fingerprint: str = found.facts["fingerprint"]
            self.schema: pa.Schema = pa.ipc.read_schema(pa.py_buffer(file.read(0, int(self._offsets[0]))))
        except (OSError, ValueError, struct.error, pa.ArrowException) as error:
            if isinstance(error, ConfigError):
                raise
            start = file.read(0, 64) if file.size else b""
            kind = "" if start.startswith(b"\xff\xff\xff\xff") else other_kind(start)
            damaged = "the headers of its batches are damaged" if isinstance(error, struct.error) else ""
            why = f"this is {kind}" if kind else damaged or getattr(error, "strerror", None) or error
            raise ConfigError(f"{where}: expected an Arrow stream, as `datasets` saves it: {why}") from error
        finally:
            file.close()
        self._file: File | None = None

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of a batch; those of a local file stay in it until their values are asked for."""
        start, stop = int(self._offsets[group]), int(self._offsets[group + 1])
        batch = pa.ipc.read_record_batch(pa.py_buffer(self._bytes(start, stop)), self.schema)
        batch.validate(full=True)  # else damaged offsets lead out of the buffers, which ends the process
        return pa.Table.from_batches([batch]).select([name for name in columns if name in self.schema.names])

    def _bytes(self, start: int, stop: int) -> Any:
        if self._file is None:
            file = open_place(self.place)
            if (file.size, file.stamp) != (self._is["size"], self._is["stamp"]):
                raise OSError("the file has changed since it was opened: put it back as it was")
            self._file = file
        if isinstance(self.place, Path):
            # To read behind the end of a mapped file ends the process.
            if self.place.stat().st_size < stop:
                raise OSError("the file became shorter while it was in use: put it back as it was")
            return np.memmap(self.place, np.uint8, "r", start, (stop - start,))
        data = self._file.read(start, stop - start)
        if len(data) < stop - start:
            raise OSError("the file became shorter while it was in use: put it back as it was")
        return data


def _batches(file: File) -> dict[str, Any]:
    """Where batches begin, and behind them where the last one ends, with their numbers of rows."""
    offsets, rows, at = [], [], 0
    while at < file.size:
        length, prefix = _length(file, at)
        if not length:
            break
        header = file.read(at + prefix, length)
        kind, body, count = _message(header)
        end = at + prefix + length + body
        if end > file.size:
            raise ValueError(f"it is cut off at byte {file.size:,}: a part of {end - at:,} bytes begins at byte {at:,}")
        if kind == DICTIONARY:
            raise ValueError("it has columns of dictionaries, which are not read: save them as plain values")
        if kind == BATCH and not 0 <= count <= MOST_ROWS:
            raise ValueError(f"it is damaged: the batch at byte {at:,} says that it has {count:,} rows")
        if kind == BATCH:
            offsets.append(at)
            rows.append(count)
        elif kind != SCHEMA or at:
            raise ValueError(f"a message of kind {kind} begins at byte {at:,}")
        at = end
    return {"offsets": np.array([*offsets, at], np.int64), "rows": np.array(rows, np.int64)}


def _length(file: File, at: int) -> tuple[int, int]:
    """Bytes of the header of a message, and of what stands before it."""
    first, second = struct.unpack("<Ii", file.read(at, 8).ljust(8, b"\0"))
    return (second, 8) if first == CONTINUES else (first, 4)  # without the mark, as before Arrow 0.15


def _message(header: bytes) -> tuple[int, int, int]:
    """(kind, bytes of the body, rows) of a message: fields 1, 3 and, in the table of field 2, 0."""
    table = _unpack("<I", header, 0)
    kind = _field(header, table, 1, "<B")
    body = _field(header, table, 3, "<q")
    place = _slot(header, table, 2)
    inner = place + _unpack("<I", header, place) if place else 0
    return kind, body, _field(header, inner, 0, "<q") if kind == BATCH else 0


def _unpack(form: str, data: bytes, at: int) -> int:
    return struct.unpack_from(form, data, at)[0]


def _slot(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table stands; 0 where it has its default."""
    fields = table - _unpack("<i", data, table)
    if 4 + 2 * number >= _unpack("<H", data, fields):
        return 0
    offset = _unpack("<H", data, fields + 4 + 2 * number)
    return table + offset if offset else 0


def _field(data: bytes, table: int, number: int, form: str) -> int:
    place = _slot(data, table, number)
    return _unpack(form, data, place) if place else 0
