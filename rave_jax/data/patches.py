"""Patches of no picture, and of several pictures end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rave_jax.batch import Patches
from rave_jax.typing import NpArray


def empty_patches(shape: tuple[int, ...], patch_numbers: int) -> Patches:
    """Padding only.

    Args:
        shape: (P,) for a document, (B, P) for rows.
        patch_numbers: C, numbers in a flattened patch.
    """
    arrays: dict[str, Any] = {
        "pixels": np.zeros((*shape, patch_numbers), np.uint8),
        "frame": np.zeros(shape, np.int32),
        "place": np.zeros((*shape, 2), np.int32),
        "window": np.zeros(shape, np.int32),
    }
    return Patches(**arrays)


def join_patches(parts: Sequence[Patches], patch_numbers: int) -> Patches:
    """Patches [P, ...] of the pictures of a document end to end, their frames and windows numbered on.

    Args:
        parts: of each picture, in order; each has at least one patch.
        patch_numbers: C, numbers in a flattened patch.
    """
    if not parts:
        return empty_patches((0,), patch_numbers)
    if len(parts) == 1:
        return parts[0]
    pixels, frame, place, window = zip(*parts, strict=True)
    arrays: dict[str, Any] = {
        "pixels": np.concatenate(pixels),
        "frame": np.concatenate(_numbered_on(frame)),
        "place": np.concatenate(place),
        "window": np.concatenate(_numbered_on(window)),
    }
    return Patches(**arrays)


def _numbered_on(numbers: Sequence[NpArray]) -> list[NpArray]:
    """Ascending numbers from 1 of each part, behind those of the parts before it."""
    before = np.cumsum([0] + [int(part[-1]) for part in numbers[:-1]])
    return [(part + n).astype(np.int32) for part, n in zip(numbers, before, strict=True)]
