"""Pictures resized as torch resizes bytes. Pillow's differ, and on some pictures by more than rounding.

Both weigh the pixels around each new one by a filter that is as wide as the pixels become large. torch (`interpolate`
with `antialias=True`, whose bytes torchvision's `resize` gives on a CPU) rounds the weights to 16 bits and resizes rows
before columns, with bytes in between; so does this, bit for bit. Processors of videos in transformers resize in torch.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import numpy as np

from rave_jax.typing import Float, Int, NpArray, UInt8

Filter = Literal["bicubic", "lanczos"]
RADIUS: dict[Filter, int] = {"bicubic": 2, "lanczos": 3}
"""How many pixels a filter reaches to each side, where nothing becomes smaller."""
BLOCK = 32
"""New pixels that are computed at once; those of a block read the same old ones."""


class Weights(NamedTuple):
    """What each new pixel of a line is made of.

    Fields:
        matrix: whole numbers; a new pixel is their sum of products with the old ones, divided by 2**bits.
        bits: see there.
    """

    matrix: Int[NpArray, "M N"]
    bits: int


def resized(pixels: UInt8[NpArray, "H W 3"], height: int, width: int, filter: Filter) -> UInt8[NpArray, "h w 3"]:
    """A picture in another size."""
    planes = pixels.transpose(2, 0, 1)
    planes = _lines(planes, width, filter)
    planes = _lines(planes.transpose(0, 2, 1), height, filter)
    return np.ascontiguousarray(planes.transpose(2, 1, 0))


def _lines(planes: UInt8[NpArray, "C L N"], count: int, filter: Filter) -> UInt8[NpArray, "C L M"]:
    """Lines of another length."""
    if planes.shape[-1] == count:
        return planes
    matrix, bits = weights(planes.shape[-1], count, filter)
    old = planes.astype(np.float64)  # in which all of these whole numbers are exact
    new = np.empty((*planes.shape[:2], count), np.uint8)
    for start in range(0, count, BLOCK):
        rows = matrix[start : start + BLOCK].astype(np.float64)
        read = np.flatnonzero(rows.any(0))
        first, last = read[0], read[-1] + 1
        sums = old[..., first:last] @ rows[:, first:last].T
        new[..., start : start + BLOCK] = np.clip(np.floor((sums + (1 << bits >> 1)) / (1 << bits)), 0, 255)
    return new


@functools.lru_cache(maxsize=16)
def weights(old: int, new: int, filter: Filter) -> Weights:
    """What each of `new` pixels of a line is made of, where it had `old`."""
    scale = old / new
    wide = max(scale, 1.0)
    reach = RADIUS[filter] * wide
    matrix = np.zeros((new, old))
    for n in range(new):
        center = scale * (n + 0.5)
        first = max(int(center - reach + 0.5), 0)
        last = min(int(center + reach + 0.5), old, first + 2 * math.ceil(reach) + 1)
        values = FILTERS[filter]((np.arange(first, last) - center + 0.5) / wide)
        matrix[n, first:last] = values / values.sum()
    # As many bits as the largest weight leaves room for.
    bits = next(n for n in range(23) if n == 22 or int(0.5 + matrix.max() * (1 << (n + 1))) >= 1 << 15)
    matrix *= 1 << bits
    rounded = np.where(matrix < 0, np.ceil(matrix - 0.5), np.floor(matrix + 0.5)).astype(np.int16)
    rounded.setflags(write=False)
    return Weights(rounded, bits)


def _bicubic(x: Float[NpArray, "N"]) -> Float[NpArray, "N"]:
    """Keys' cubic with a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: Float[NpArray, "N"]) -> Float[NpArray, "N"]:
    """Lanczos' filter of 3 lobes."""
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


FILTERS = {"bicubic": _bicubic, "lanczos": _lanczos}
