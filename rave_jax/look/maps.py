"""Attention over a picture: weights of key tokens on the image's grid, and the share inside a box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rave_jax.batch import Kind, TokenInfo
from rave_jax.layout import WHOLE, Box, Shown
from rave_jax.typing import Float, NpArray


@dataclass(frozen=True)
class Look:
    """Where the answer to one question looked in one picture.

    Attributes:
        weights: attention from the queries that chose the answer's tokens, averaged over them, on each cell
            of a grid over the picture (`over_picture`); [layers, heads, grid rows, grid columns]. What is missing to 1
            went to text, to other pictures, and to visual tokens that show no part of the picture.
        layers: numbers of these layers in the model; empty: they are all of its layers.
        question: the same from the text of the question, averaged over its tokens; None where it was not asked for, or
            where no token of the question stands behind the picture.
    """

    weights: Float[NpArray, "L H y x"]
    layers: tuple[int, ...] = ()
    question: Float[NpArray, "L H y x"] | None = None

    @property
    def of_question(self) -> Look | None:
        """Where the question looked."""
        return None if self.question is None else Look(self.question, self.layers)

    @property
    def on_picture(self) -> float:
        """Share of all attention that went to the picture."""
        return float(self.weights.sum((-2, -1)).mean())

    def on_picture_by_head(self, layers: tuple[int, ...] = ()) -> Float[NpArray, "H"]:
        """The same of each head, averaged over `layers` (all when empty)."""
        return self._of(layers).sum((-2, -1)).mean(0)

    def _of(self, layers: tuple[int, ...]) -> Float[NpArray, "L H y x"]:
        """Weights in some layers, by their numbers in the model; of all when empty."""
        return self.weights[[self.layers.index(n) if self.layers else n for n in layers]] if layers else self.weights

    def heat(self, layers: tuple[int, ...] = ()) -> Float[NpArray, "y x"]:
        """Map averaged over heads and over `layers` (all when empty), scaled to sum to 1 over the picture."""
        heat = self._of(layers).mean((0, 1))
        return heat / max(float(heat.sum()), 1e-30)

    def times_even(self, layers: tuple[int, ...] = ()) -> Float[NpArray, "y x"]:
        """`heat` as multiples of attention spread evenly over the picture: 1 everywhere is even, and the mean is 1."""
        heat = self.heat(layers)
        return heat * heat.size

    def times_even_by_head(self, layers: tuple[int, ...] = ()) -> Float[NpArray, "H y x"]:
        """The same for each head alone, averaged over `layers` (all when empty)."""
        weights = self._of(layers).mean(0)
        sums = weights.sum((-2, -1), keepdims=True)
        return weights / np.maximum(sums, 1e-30) * weights[0].size

    def in_box(self, box: Box, layers: tuple[int, ...] = ()) -> float:
        """Share of the picture's attention inside `box` (in fractions of the picture's width and height)."""
        heat = self.heat(layers)
        return float((heat * coverage(box, heat.shape)).sum())


def over_picture(
    info: TokenInfo, weights: Float[NpArray, "L H S"], shown: Sequence[Shown] = (), picture: int = 1
) -> Float[NpArray, "L H y x"] | None:
    """Weights of the visual tokens that show a picture, on one grid over it; None where the row has no such picture.

    The grid has the smallest cells that any of the picture's grids has. Where grids lie over each other, as tiles and
    the whole picture do, their weights add up. The weight of a token is spread evenly over the part that it shows, and
    the part beyond the picture is left out.

    Args:
        info: token codes of one row (arrays [S]).
        weights: attention to each token.
        shown: for each image number of `info`, from 1, what its tokens show; empty: each is a whole picture.
        picture: number of the picture or video in the conversation, from 1.
    """
    shown = shown or [Shown(n, WHOLE) for n in range(1, int(np.max(np.asarray(info.image), initial=0)) + 1)]
    found = [(n, one.box) for n, one in enumerate(shown, 1) if one.picture == picture and one.box is not None]
    grids = [(grid, box) for n, box in found if (grid := on_grid(info, weights, n)) is not None]
    if not grids:
        return None
    rows = max(round(grid.shape[-2] / (box[3] - box[1])) for grid, box in grids)
    cols = max(round(grid.shape[-1] / (box[2] - box[0])) for grid, box in grids)
    spread = [_spread(grid, box, max(rows, 1), max(cols, 1)) for grid, box in grids]
    return np.sum(spread, axis=0) if len(spread) > 1 else spread[0]


def _spread(grid: Float[NpArray, "L H h w"], box: Box, rows: int, cols: int) -> Float[NpArray, "L H y x"]:
    """Weights on the cells of a part of a picture, on a grid over the whole of it."""
    if box == WHOLE and grid.shape[-2:] == (rows, cols):
        return grid
    down = _shares(grid.shape[-2], box[1], box[3], rows)
    across = _shares(grid.shape[-1], box[0], box[2], cols)
    return (down @ grid @ across.T).astype(np.float32)


def _shares(cells: int, low: float, high: float, made: int) -> Float[NpArray, "made cells"]:
    """How much of each of so many cells between `low` and `high` lies in each of `made` cells between 0 and 1."""
    edges, into = low + (high - low) * np.arange(cells + 1) / cells, np.arange(made + 1) / made
    over = np.minimum(into[1:, None], edges[None, 1:]) - np.maximum(into[:-1, None], edges[None, :-1])
    return np.clip(over, 0.0, None) * cells / (high - low)


def on_grid(info: TokenInfo, weights: Float[NpArray, "L H S"], image: int = 1) -> Float[NpArray, "L H y x"] | None:
    """Weights of the tokens of one image number on its grid; None where the row has no such number.

    Args:
        info: token codes of one row (arrays [S]).
        weights: attention to each token.
        image: the number. The frames of a video are summed; context tokens are in no cell.
    """
    codes = {name: np.asarray(code) for name, code in info._asdict().items()}
    tokens = np.flatnonzero((codes["image"] == image) & (codes["kind"] != Kind.CONTEXT))
    if not len(tokens):
        return None
    rows, cols = (int(codes[name][tokens[0]]) for name in ("grid_h", "grid_w"))
    cells = codes["row"][tokens] * cols + codes["col"][tokens]
    grid = np.zeros((*weights.shape[:2], rows * cols), np.float32)
    for cell, token in zip(cells, tokens, strict=True):
        grid[..., cell] += weights[..., token]
    return grid.reshape(*weights.shape[:2], rows, cols)


def relative_box(box: Box, width: int, height: int) -> Box:
    """A pixel box in fractions of the picture. An image processor may stretch the picture; fractions stay."""
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def area(box: Box) -> float:
    """Share of the picture that a relative box covers: what attention spread evenly would put there."""
    return max(0.0, min(box[2], 1.0) - max(box[0], 0.0)) * max(0.0, min(box[3], 1.0) - max(box[1], 0.0))


def coverage(box: Box, grid: tuple[int, int]) -> Float[NpArray, "y x"]:
    """How much of each grid cell a relative box covers, 0..1."""

    def along(low: float, high: float, cells: int) -> NpArray:
        edges = np.arange(cells + 1) / cells
        return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0.0, None) * cells

    return np.outer(along(box[1], box[3], grid[0]), along(box[0], box[2], grid[1]))
