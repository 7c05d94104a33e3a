"""Visual Funnel: crops around the place where the model says it should look, the wider the less sure it is.

Source: the code github.com/jungnerd/Visual-Funnel, whose authorship was not checked. With a the attention of the last
row of a localisation prompt over the N cells of the picture, averaged over the heads of layer 22 and normalised to 1:

    H = - sum a log a / log N           a1 = 1.2 + 0.6 H           a2 = 1.6 + 1.2 H
    focal: square of 224 pixels around the centre of a
    near:  square of a1 224 around the centre of a inside focal         wide: square of a2 224, inside near

A cell is inside a box if its middle is; where a box has no attention its own middle is taken. Squares are moved into
the picture, and cut to its width and height where they are larger. The question is then asked of the whole picture and
the three crops together. Certain: all of it, from the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from rave_jax.config import check_fields, require
from rave_jax.typing import Float, NpArray

View = Literal["whole", "focal", "near", "wide"]
PixelBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class VisualFunnel:
    """Ask again, with three crops around what the model looks at beside the picture (Visual Funnel)."""

    where: str = "To answer '{question}', where in the image should I look?"
    """The localisation prompt; {question} stands for the question's text."""
    layer: int = 22
    """The decoder layer whose attention is read, by global number."""
    base: float = 224.0
    """Side of the focal crop, in pixels of the picture as it is given."""
    near: tuple[float, float] = (1.2, 0.6)
    """Side of the next crop as a multiple of the focal one: the first number plus the second times the entropy H."""
    wide: tuple[float, float] = (1.6, 1.2)
    """The same of the widest crop."""
    views: tuple[View, ...] = ("whole", "focal", "near", "wide")
    """What is asked, in this order; `whole` alone asks as without it."""

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            asked = self.where.format(question="?")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            asked = ""
        require(bool(asked.strip()), "where", self.where, "a text whose only name in braces is {question}")
        require(0 <= self.layer < 10**4, "layer", self.layer, "the number of a layer, from 0 to 9,999")
        require(0 < self.base <= 1e6, "base", self.base, "a number of pixels above 0")
        for name in ("near", "wide"):
            value = getattr(self, name)
            require(value[0] > 0 and value[1] >= 0, name, value, "a number above 0 and one from 0")
        require(len(self.views) > 0, "views", self.views, "at least one view")
        require(len(set(self.views)) == len(self.views), "views", self.views, "each view once")

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose attention is read."""
        return (self.layer,)


def entropy(heat: Float[NpArray, "y x"]) -> float:
    """H of attention that adds up to 1, between 0 and 1."""
    if heat.size == 1:
        return 0.0
    some = heat[heat > 0]
    return float(np.clip(-np.sum(some * np.log(some)) / math.log(heat.size), 0.0, 1.0))


def boxes(how: VisualFunnel, heat: Float[NpArray, "y x"], size: tuple[int, int]) -> dict[View, PixelBox]:
    """The three squares.

    Args:
        how: the settings.
        heat: attention on the cells of the picture.
        size: width and height of the picture.
    """
    total = float(heat.sum())
    heat = np.asarray(heat, np.float64) / total if total > 0 else np.full(heat.shape, 1 / heat.size)
    H = entropy(heat)
    found: dict[View, PixelBox] = {"focal": _square(_centre(heat, size), how.base, size)}
    for view, before, (least, more) in (("near", "focal", how.near), ("wide", "near", how.wide)):
        found[view] = _square(_centre(heat, size, found[before]), (least + more * H) * how.base, size)
    return found


def views(how: VisualFunnel, heat: Float[NpArray, "y x"], picture: Image.Image) -> list[Image.Image]:
    """The pictures that are asked, in order."""
    made = boxes(how, heat, picture.size)
    return [picture if view == "whole" else picture.crop(made[view]) for view in how.views]


def _centre(heat: Float[NpArray, "y x"], size: tuple[int, int], inside: PixelBox | None = None) -> tuple[float, float]:
    """The centre of attention, in pixels, of the cells whose middle is inside a box; the box's where they have none."""
    rows, columns = heat.shape
    x, y = ((np.arange(cells) + 0.5) * (pixels / cells) for cells, pixels in ((columns, size[0]), (rows, size[1])))
    if inside is not None:
        left, top, right, bottom = inside
        within = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
        heat = np.where(within, heat, 0.0)
        if heat.sum() <= 1e-12:
            return (left + right) / 2, (top + bottom) / 2
    return float((heat.sum(0) * x).sum() / heat.sum()), float((heat.sum(1) * y).sum() / heat.sum())


def _square(centre: tuple[float, float], side: float, size: tuple[int, int]) -> PixelBox:
    """The box around a centre, moved into the picture."""
    spans = []
    for middle, pixels in zip(centre, size, strict=True):
        length = min(side, float(pixels))
        start = min(max(middle - length / 2, 0.0), pixels - length)
        low = min(round(start), pixels - 1)
        spans.append((low, max(round(start + length), low + 1)))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom
