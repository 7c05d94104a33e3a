"""The safetensors format: headers checked against the file, slices read into given memory, tensors streamed out.

A file is eight bytes with the length of a JSON header, the header (`{key: {dtype, shape, data_offsets}}`), and the
tensors' bytes, little-endian and C-ordered (https://huggingface.co/docs/safetensors). We read with `pread` into
memory that the caller owns, not through a memory map: mapped pages count as memory of this process until the kernel
takes them back, and an import must stay near the size of one shard.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from rave_jax.config import ConfigError
from rave_jax.files import open_regular
from rave_jax.typing import NpArray

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 4 << 20
"""Bytes read at a time where a slice is strided or cast."""
MAX_HEADER = 100_000_000
"""Longest header the format allows."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read or written; the message names every file and key concerned."""


class Stored(NamedTuple):
    """One tensor in a file: dtype name as in the header, shape, and the first byte in the file."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a file, and what is wrong with it (empty for a sound file).

    A tensor that does not lie wholly in the file is named among the problems and left in the result, so that it is
    not reported missing as well.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER):
                return {}, [f"{path.name}: {size} bytes are too few for its header: truncated, or not safetensors"]
            entries = json.loads(file.read(length))
    except OSError as error:
        return {}, [f"{path.name}: cannot be read: {error.strerror or error}"]
    except (ValueError, RecursionError) as error:
        return {}, [f"{path.name}: its header is corrupt: {error}"]
    if not isinstance(entries, dict):
        return {}, [f"{path.name}: its header is corrupt: not a JSON object"]
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    spans: list[tuple[int, int]] = []
    for key, entry in entries.items():
        if key == "__metadata__":
            continue
        try:
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            if not 0 <= begin <= end or min(shape, default=0) < 0:
                raise ValueError
            spans.append((begin, end))
            tensors[key] = Stored(path, key, str(entry["dtype"]), shape, 8 + length + begin)
        except (KeyError, TypeError, ValueError):
            problems.append(f"{key} ({path.name}): its header entry is corrupt")
            continue
        stored = tensors[key]
        if 8 + length + end > size:
            problems.append(f"{key} ({path.name}): truncated: it ends at byte {8 + length + end} of {size}")
        elif stored.dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[stored.dtype].itemsize:
            problems.append(f"{key} ({path.name}): {end - begin} bytes do not make {stored.dtype} {list(shape)}")
    # The format: tensors lie end to end and fill the file.
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if not problems and [*(begin for begin, _ in spans), size - 8 - length] != ends:
        problems.append(f"{path.name}: its tensors overlap, or leave unused bytes between or after them")
    return tensors, problems


class Slice(NamedTuple):
    """Memory, and the slice of a tensor that fills it: one slice of step 1 per axis."""

    out: NpArray
    index: tuple[slice, ...]


def read_into(stored: Stored, shape: Sequence[int], slices: Sequence[Slice]) -> None:
    """Fill each slice's memory with `tensor.reshape(shape)[index]`, cast to the memory's dtype, in one pass.

    Args:
        stored: the tensor.
        shape: as many numbers as the tensor has, in the same order.
        slices: what is wanted.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    wanted = [_Part(out, [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]) for out, index in slices]
    try:
        with open_regular(stored.file) as file:
            _read(file.fileno(), stored.offset, DTYPES[stored.dtype], tuple(shape), wanted)
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{stored.key} ({stored.file}): cannot be read: {error}") from error


class _Part(NamedTuple):
    out: NpArray
    bounds: list[tuple[int, int]]


def _read(file: int, offset: int, dtype: np.dtype, shape: tuple[int, ...], parts: list[_Part]) -> None:
    rest = math.prod(shape[1:]) * dtype.itemsize  # bytes of one row of axis 0
    pieced: list[_Part] = []
    for part in parts:
        whole_rows = all(bound == (0, n) for bound, n in zip(part.bounds[1:], shape[1:], strict=True))
        if whole_rows and part.out.dtype == dtype and part.out.flags.c_contiguous:
            _pread(file, offset + part.bounds[0][0] * rest, part.out)
        else:
            pieced.append(part)
    if not pieced:
        return
    low, high = min(p.bounds[0][0] for p in pieced), max(p.bounds[0][1] for p in pieced)
    if rest > CHUNK and len(shape) > 1:
        for n in range(low, high):
            inner = [_Part(p.out[n - p.bounds[0][0]], p.bounds[1:]) for p in pieced if n in range(*p.bounds[0])]
            _read(file, offset + n * rest, dtype, shape[1:], inner)
        return
    rows = max(1, CHUNK // max(rest, 1))
    for start in range(low, high, rows):
        stop = min(start + rows, high)
        scratch = np.empty((stop - start, *shape[1:]), dtype)
        _pread(file, offset + start * rest, scratch)
        for out, ((first, last), *inner) in pieced:
            n, m = max(first, start), min(last, stop)
            if n < m:
                out[n - first : m - first] = scratch[(slice(n - start, m - start), *(slice(*b) for b in inner))]


def _pread(file: int, offset: int, out: NpArray) -> None:
    view = memoryview(out.reshape(-1).view(np.uint8))
    while len(view):
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise EOFError("the file ends early")
        view, offset = view[count:], offset + count


class Planned(NamedTuple):
    """A tensor to be written: key, dtype and shape."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_header(file: BinaryIO, tensors: Iterable[Planned]) -> None:
    """Begin a file of these tensors; their bytes must follow in this order."""
    # transformers refuses files that do not say which framework's layout they have.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers that map the file want aligned numbers
    file.write(len(text).to_bytes(8, "little") + text)


def write_tensor(file: BinaryIO, value: NpArray) -> None:
    """The tensor's bytes."""
    file.write(memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8)))
