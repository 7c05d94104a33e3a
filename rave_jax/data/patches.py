"""Patches of no picture, and of several pictures end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rave_jax.batch import Patches
from rave_jax.families.config import PatchSizes
from rave_jax.typing import NpArray


def empty_patches(shape: tuple[int, ...], patch_numbers: int, mixes: tuple[int, int] = (0, 0)) -> Patches:
    """Padding only.

    Args:
        shape: (P,) for a document, (B, P) for rows.
        patch_numbers: C, numbers in a flattened patch.
        mixes: M and K of `Patches.source`.
    """
    mixed = (*shape[:-1], *mixes)
    arrays: dict[str, Any] = {
        "pixels": np.zeros((*shape, patch_numbers), np.uint8),
        "frame": np.zeros(shape, np.int32),
        "place": np.zeros((*shape, 2), np.int32),
        "window": np.zeros(shape, np.int32),
        "source": np.zeros(mixed, np.int32),
        "weight": np.zeros(mixed, np.float32),
    }
    return Patches(**arrays)


def join_patches(parts: Sequence[Patches], sizes: PatchSizes) -> Patches:
    """Patches [P, ...] of the pictures of a document end to end, their frames, windows and merge units numbered on.

    Args:
        parts: of each picture, in order; each has at least one patch.
        sizes: of the model's patches.
    """
    nothing = empty_patches((0,), sizes.numbers, (0, sizes.mixed))
    if not parts:
        return nothing
    pixels, frame, place, window, source, weight = zip(*parts, strict=True)
    units = np.cumsum([0] + [part.length // sizes.merge for part in parts[:-1]])
    arrays: dict[str, Any] = {
        "pixels": np.concatenate(pixels) if len(parts) > 1 else pixels[0],
        "frame": np.concatenate(_numbered_on(frame)),
        "place": np.concatenate(place),
        "window": np.concatenate(_numbered_on(window)),
        "source": nothing.source,
        "weight": nothing.weight,
    }
    if sizes.mixed:
        shifted = [moved(one, int(before)) for one, before in zip(source, units, strict=True)]
        arrays |= {"source": np.concatenate(shifted), "weight": np.concatenate(weight)}
    return Patches(**arrays)


def part_of(patches: Patches, span: range, sizes: PatchSizes) -> tuple[Patches, int]:
    """Some of a document's patches alone, and the number of the first visual token that they become.

    Args:
        patches: of the document.
        span: which of them: whole frames, or where units are mixed, whole pictures.
        sizes: of the model's patches.
    """
    first, stop = span.start // sizes.merge, span.stop // sizes.merge
    arrays: dict[str, Any] = patches._asdict()
    arrays |= {name: arrays[name][span.start : span.stop] for name in ("pixels", "frame", "place", "window")}
    if sizes.mixed:
        source: Any = patches.source
        (own,) = np.nonzero(((source >= first) & (source < stop)).any(axis=-1))
        arrays |= {"source": moved(source[own], -first), "weight": arrays["weight"][own]}
        first = int(own[0]) if len(own) else 0
    return Patches(**arrays), first


def moved(source: Any, units: int) -> Any:
    """Numbers of merge units as they are behind so many others; rows that the model has learned keep theirs."""
    return np.where(source < 0, source, source + units).astype(np.int32)


def _numbered_on(numbers: Sequence[NpArray]) -> list[NpArray]:
    """Ascending numbers from 1 of each part, behind those of the parts before it."""
    before = np.cumsum([0] + [int(part[-1]) for part in numbers[:-1]])
    return [(part + n).astype(np.int32) for part, n in zip(numbers, before, strict=True)]
