"""A GGUF file: its metadata, and its tensors dequantized. The `gguf` package reads it, which is not always there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.typing import NpArray

INSTALL = "pip install 'rave-jax[gguf]', or pip install gguf"
MAGIC = b"GGUF"


class GgufData(NamedTuple):
    """A tensor of a file.

    Fields:
        shape: in the order of a HuggingFace checkpoint.
        kind: its number type, as Q4_K.
        read: gives its numbers in float32.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], NpArray]


class GgufFile(NamedTuple):
    """What a file holds."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufData]


def open_gguf(path: Path) -> GgufFile:
    """Read a file's metadata; tensors are read when they are asked for.

    Raises:
        CheckpointError: the `gguf` package is missing, or the file is none that it reads.
    """
    if not path.is_file():
        files = sorted(file.name for file in path.glob("*.gguf")) if path.is_dir() else []
        hint = f"; it holds {', '.join(files[:3])}" if files else ""
        raise CheckpointError(f"{path}: is no file, expected a GGUF file{hint}")
    with path.open("rb") as file:
        if (start := file.read(len(MAGIC))) != MAGIC:
            raise CheckpointError(f"{path}: is no GGUF file: it begins with {start!r}, expected {MAGIC!r}")
    try:
        # By name: neither type checkers nor installations have to have it.
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(f"{path}: the package gguf reads such files, and it is missing: {INSTALL}") from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        found = list(reader.tensors)
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError, TypeError) as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error}): download it again") from error

    if isinstance(parts := metadata.get("split.count"), int) and parts > 1:
        raise CheckpointError(f"{path}: is one of {parts} parts: join them into one file first")

    def data(tensor: Any) -> GgufData:
        def read() -> NpArray:
            try:
                numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                kind = tensor.tensor_type.name
                raise CheckpointError(
                    f"{path}: {tensor.name} is quantized as {kind}, which the installed package gguf does not read: "
                    "install its newest release, or take a file with another quantization"
                ) from error
            return np.asarray(numbers, np.float32).reshape(shape)

        shape = tuple(int(n) for n in reversed(tensor.shape))
        return GgufData(shape, tensor.tensor_type.name, read)

    return GgufFile(path, metadata, {tensor.name: data(tensor) for tensor in found})
