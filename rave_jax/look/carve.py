"""CARVE: the picture's parts that a question looks at more than a plain description does, cut out and enlarged.

Source: arXiv 2509.06461 and its released code, variant v4. With A^Q and A^G the attention of the row that chooses token
t of the answer, and of a general description, over the picture's tokens, averaged over heads, and l in 20 .. 25:

    S = sum_t (t + 1) sum_l resize(A^Q_lt / (A^G_lt + lambda))          t = 0, 1, .. while both go on, lambda = 1e-8
    pixels in the top 20 % of S form connected parts; of n parts the max(3, int(0.2 n)) with the largest sum of S stay
    the rest of the picture becomes black; the box around what stays is cut out, and enlarged until it covers the
    size of the picture

The question is then asked of the picture and this view together. Certain: all of it, from the code. Ours: the sum is
made on the grid of the tokens and resized once, which is the same; and a view has at most 16 times the pixels of the
picture, beyond which a narrow strip would be enlarged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rave_jax.config import check_fields, require
from rave_jax.typing import Bool, Float, Int, NpArray

MOST = 16
"""Pixels of a view, as a multiple of the picture's."""


@dataclass(frozen=True)
class Carve:
    """Ask again, with what the question looks at more than a description does beside the picture (CARVE)."""

    general: str = "Write a general description of the image."
    """What the model is asked to compare with."""
    layers: tuple[int, ...] = (20, 21, 22, 23, 24, 25)
    """Decoder layers whose attention is compared, by global number."""
    fraction: float = 0.2
    """The part of the pixels that stays, and of the connected parts; 1 asks as without it."""
    least: int = 3
    """Connected parts that stay at least."""
    floor: float = 1e-8
    """lambda, which is added to the attention of the description."""
    steps: int = 32
    """Tokens of the answers, from the first on, whose attention is compared."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(bool(self.general.strip()), "general", self.general, "a text")
        require(len(self.layers) > 0, "layers", self.layers, "at least one layer")
        require(0 < self.fraction <= 1, "fraction", self.fraction, "a number above 0, at most 1")
        require(1 <= self.least <= 10**6, "least", self.least, "a number from 1 to 1,000,000")
        require(self.floor > 0, "floor", self.floor, "a number above 0")
        require(1 <= self.steps <= 10**6, "steps", self.steps, "a number from 1 to 1,000,000")


def fused(
    how: Carve, asked: Float[NpArray, "L n y x"], general: Float[NpArray, "L m y x"], size: tuple[int, int]
) -> Float[NpArray, "height width"]:
    """S, for each pixel.

    Args:
        how: the settings.
        asked, general: attention of n and of m tokens of both answers, in the layers that are compared.
        size: width and height of the picture.
    """
    steps = min(asked.shape[1], general.shape[1], how.steps)
    ratio = np.asarray(asked[:, :steps], np.float64) / (np.asarray(general[:, :steps], np.float64) + how.floor)
    total = np.einsum("Lnyx,n->yx", ratio, np.arange(1, steps + 1))
    # It is compared with itself alone, so its size does not matter; float32 is what Pillow resizes.
    largest = max(float(total.max()), 1e-30)
    resized = Image.fromarray((total / largest).astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float64) * largest


def kept(how: Carve, total: Float[NpArray, "y x"]) -> Bool[NpArray, "y x"]:
    """Which pixels stay: the connected parts with the largest sum."""
    mask = total >= np.percentile(total, (1 - how.fraction) * 100)
    number = connected(mask)
    parts = int(number.max())
    sums = np.bincount(number[mask], weights=total[mask], minlength=parts + 1)[1:]
    best = np.argsort(-sums, kind="stable")[: max(how.least, int(parts * how.fraction))]
    return mask & np.isin(number, best + 1)


def refined(picture: Image.Image, mask: Bool[NpArray, "y x"]) -> Image.Image | None:
    """What stays of the picture, cut out and enlarged; None where all of it stays."""
    if mask.all():
        return None
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    cut = Image.fromarray(np.asarray(picture.convert("RGB")) * mask[..., None]).crop(box)
    scale = max(picture.width / cut.width, picture.height / cut.height)
    scale = min(scale, math.sqrt(MOST * picture.width * picture.height / (cut.width * cut.height)))
    return cut.resize((int(cut.width * scale), int(cut.height * scale)), Image.Resampling.LANCZOS)


def connected(mask: Bool[NpArray, "y x"]) -> Int[NpArray, "y x"]:
    """The number of each pixel's connected part, from 1; 0 outside. Pixels touch by their sides."""
    leader: list[int] = [0]

    def found(part: int) -> int:
        while leader[part] != part:
            leader[part] = leader[leader[part]]
            part = leader[part]
        return part

    number: Int[NpArray, "y x"] = np.zeros(mask.shape, np.int64)
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            above = {found(part) for part in np.unique(number[y - 1, start:stop]).tolist() if part} if y else set()
            mine = min(above, default=len(leader))
            if mine == len(leader):
                leader.append(mine)
            for part in above:
                leader[part] = mine
            number[y, start:stop] = mine
    of_part = np.array([found(part) for part in range(len(leader))])
    _, numbered = np.unique(np.concatenate([[0], of_part[1:]]), return_inverse=True)
    return numbered[number]
