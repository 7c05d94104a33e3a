"""Handwritten digits: scikit-learn's 1,797 pictures of 8 by 8 pixels, split by content and enlarged."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from rave_jax.data.synthetic.base import Split, in_split
from rave_jax.typing import Int, NpArray, UInt8


@functools.cache
def load() -> tuple[UInt8[NpArray, "N 8 8"], Int[NpArray, " N"]]:
    """All digits as ink 0..255, and their labels 0..9."""
    # Imported here: scikit-learn takes a second, and runs without synthetic data do not need it.
    from sklearn.datasets import load_digits

    data = load_digits()
    ink = np.round(np.asarray(data.images) * (255 / 16)).astype(np.uint8)
    return ink, np.asarray(data.target)


@functools.cache
def members(split: Split) -> tuple[Int[NpArray, " N"], ...]:
    """For each label 0..9, the numbers of the digit pictures that belong to the split."""
    ink, labels = load()
    mine = np.array([in_split(picture.tobytes(), split) for picture in ink])
    return tuple(np.flatnonzero(mine & (labels == label)) for label in range(10))


def pick(rng: np.random.Generator, split: Split, label: int) -> int:
    """The number of a random digit picture of a label."""
    mine = members(split)[label]
    return int(mine[rng.integers(len(mine))])


@functools.lru_cache(maxsize=32)
def enlarged(size: int) -> UInt8[NpArray, "N size size"]:
    """The ink of all digits, `size` pixels square."""
    ink, _ = load()
    return np.stack([np.asarray(Image.fromarray(d).resize((size, size), Image.Resampling.BICUBIC)) for d in ink])
