"""Sizes that were measured, in files beside the data: blocks of samples, each file whole or not there.

A file holds what is a pure function of its name: sizes of samples `block * BLOCK` and on of a part of a source, under
the settings that sizes depend on. So processes may write the same file at the same time, and a file that is damaged, or
of another version, counts as not there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from rave_jax.data.beside import write_whole
from rave_jax.data.packing.sizes import Sizes
from rave_jax.typing import Int, NpArray

BLOCK = 2**16
"""Samples of a file: 1 MB."""
COLUMNS = len(Sizes._fields)


def block_path(folder: Path, settings: str, fingerprint: str, block: int) -> Path:
    """The file of a block of a part.

    Args:
        folder: beside the data.
        settings: digest of all that sizes depend on.
        fingerprint: of the part.
        block: its number.
    """
    of = hashlib.blake2b(f"{settings} {fingerprint}".encode(), digest_size=16).hexdigest()
    return folder / f"sizes-{of}-{block}"


def write_block(path: Path, sizes: Int[NpArray, "4 N"], status: Int[NpArray, "N"], settings: str) -> None:
    """Write a block.

    Args:
        path: of `block_path`.
        sizes: the columns of `Sizes`.
        status: of each sample (`index.py`).
        settings: as in `block_path`; a file says for which ones it holds.

    Raises:
        OSError: it cannot be written.
    """
    payload = sizes.astype("<i4").tobytes() + status.astype(np.uint8).tobytes()
    header = {"settings": settings, "samples": len(status), "check": _check(payload)}
    write_whole(path, lambda file: file.write(json.dumps(header).encode() + b"\n" + payload))


def read_block(path: Path, samples: int, settings: str) -> tuple[Any, Any] | None:
    """The sizes [4, N] and status [N] of a block, or None where there is no sound file of it."""
    try:
        head, _, payload = path.read_bytes().partition(b"\n")
        expected = {"settings": settings, "samples": samples, "check": _check(payload)}
        if json.loads(head) != expected or len(payload) != samples * (4 * COLUMNS + 1):
            return None
    except (OSError, ValueError):
        return None
    numbers = np.frombuffer(payload, "<i4", COLUMNS * samples).reshape(COLUMNS, samples)
    return numbers, np.frombuffer(payload, np.uint8, samples, COLUMNS * samples * 4)


def _check(payload: bytes) -> str:
    return hashlib.blake2b(payload, digest_size=16).hexdigest()
