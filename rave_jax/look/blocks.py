"""A picture cut into blocks, and which tokens show each: what is hidden at once to learn where an answer comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rave_jax.batch import Kind, TokenInfo
from rave_jax.layout import WHOLE, Box, Shown
from rave_jax.look.maps import coverage
from rave_jax.typing import Bool, Float, NpArray

_ROUNDING = 1e-9
"""Keeps a middle that lies on an edge on one side of it."""


class Blocks(NamedTuple):
    """Blocks of a picture, numbered along the rows of a grid.

    Fields:
        rows, cols: of the grid.
        shows: which tokens of the row show each block.
    """

    rows: int
    cols: int
    shows: Bool[NpArray, "N S"]


def blocks_of(info: TokenInfo, shown: Sequence[Shown] = (), picture: int = 1, most: int = 64) -> Blocks | None:
    """The blocks of one picture; None where the row has no such picture.

    A token shows a block if the middle of what it shows lies in the block, or the middle of the block in what it shows,
    whichever of the picture's grids it is in. So a block is hidden in tiles and in the whole picture at once. Tokens
    that show no part of the picture show no block. The grid has the cells of the finest of the picture's grids, or
    fewer rows and columns where those are more than `most`.

    Args:
        info: token codes of one row (arrays [S]).
        shown: for each image number of `info`, from 1, what its tokens show; empty: each is a whole picture.
        picture: number of the picture in the conversation, from 1.
        most: blocks at most.
    """
    codes = {name: np.asarray(code) for name, code in info._asdict().items()}
    shown = shown or [Shown(n, WHOLE) for n in range(1, int(codes["image"].max(initial=0)) + 1)]
    low, high = np.full((2, 2, len(codes["image"])), np.nan)  # of what each token shows, down and across
    rows, cols = 0, 0
    for number, one in enumerate(shown, start=1):
        tokens = np.flatnonzero((codes["image"] == number) & (codes["kind"] == Kind.VISUAL))
        if one.picture != picture or one.box is None or not len(tokens):
            continue
        x1, y1, x2, y2 = one.box
        height, width = int(codes["grid_h"][tokens[0]]), int(codes["grid_w"][tokens[0]])
        place = np.stack([codes["row"][tokens], codes["col"][tokens]])
        start, step = np.array([[y1], [x1]]), np.array([[(y2 - y1) / height], [(x2 - x1) / width]])
        low[:, tokens], high[:, tokens] = start + step * place, start + step * (place + 1)
        rows, cols = max(rows, round(height / (y2 - y1))), max(cols, round(width / (x2 - x1)))
    if not rows or not cols:
        return None
    rows, cols = _at_most(rows, cols, most)
    edges = np.stack(np.divmod(np.arange(rows * cols), cols))[:, :, None] / np.array([[[rows]], [[cols]]])
    far = edges + 1 / np.array([[[rows]], [[cols]]])
    low, high = low[:, None], high[:, None]
    # NaN is in nothing.
    in_block = _inside((low + high) / 2, edges, far)
    in_token = _inside((edges + far) / 2, low, high)
    return Blocks(rows, cols, in_block | in_token)


def _inside(point: Float[NpArray, "2 N S"], low: Float[NpArray, "2 N S"], high: Float[NpArray, "2 N S"]) -> NpArray:
    """Which points lie in boxes; [N,S]."""
    return np.all((low <= point + _ROUNDING) & (point + _ROUNDING < high), axis=0)


def _at_most(rows: int, cols: int, most: int) -> tuple[int, int]:
    """Rows and columns with the same proportions and at most so many cells."""
    if rows * cols <= most:
        return rows, cols
    scale = math.sqrt(most / (rows * cols))
    fewer = max(1, int(rows * scale))
    return fewer, max(1, min(cols, most // fewer, round(cols * scale)))


class KnockOut(NamedTuple):
    """How far the log-probability of one answer falls when a block of the picture is hidden from all text.

    Fields:
        falls: of each block, in nats; below 0 where the answer gets more likely.
        whole: the fall when the whole picture is hidden.
        log_probability: of the answer with nothing hidden.
    """

    falls: Float[NpArray, "y x"]
    whole: float
    log_probability: float

    @property
    def loss(self) -> Float[NpArray, "y x"]:
        """The falls, 0 where the answer gets more likely."""
        return np.maximum(self.falls, 0.0)

    def in_box(self, box: Box) -> float:
        """What of all falls lies inside a box, in nats. A block that the box covers in part counts in part."""
        return float((self.loss * coverage(box, self.falls.shape)).sum())

    def times_even(self) -> Float[NpArray, "y x"]:
        """The falls as multiples of their mean; 1 everywhere where nothing falls."""
        mean = float(self.loss.mean())
        return self.loss / mean if mean > 0 else np.ones_like(self.falls)
