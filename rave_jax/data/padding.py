"""Visual tokens that show the border that some families add to a picture, to make it square, and not the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rave_jax.batch import Kind, Patches, TokenInfo
from rave_jax.layout import WHOLE, Box, Shown
from rave_jax.typing import Int, NpArray


def padded(
    info: TokenInfo, shown: Sequence[Shown], visual_index: Int[NpArray, "T"], patches: Patches
) -> Int[NpArray, "T"]:
    """1 on visual tokens of which less than half lies in their picture, 0 on others; what the model has learned, as the
    ends of lines, shows nothing and is none of them.

    Args:
        info: of one document.
        shown: what the tokens of each image number show, from 1.
        visual_index, patches: of the document.
    """
    found: Any = np.zeros(len(info.kind), np.int32)
    for number, (_, box) in enumerate(shown, start=1):
        if box is None or _is_inside(box):
            continue
        at = np.flatnonzero((info.kind == Kind.VISUAL) & (info.image == number))
        row, col, height, width = (np.asarray(code)[at] for code in (info.row, info.col, info.grid_h, info.grid_w))
        share = _within(box[0], box[2], col, width) * _within(box[1], box[3], row, height)
        learned = patches.source[visual_index[at], 0] < 0 if patches.source.size else np.zeros(len(at), bool)
        found[at] = (share < 0.5) & ~learned
    return found


def _is_inside(box: Box) -> bool:
    """Does the box reach beyond the picture nowhere?"""
    return box[0] >= WHOLE[0] and box[1] >= WHOLE[1] and box[2] <= WHOLE[2] and box[3] <= WHOLE[3]


def _within(low: float, high: float, place: NpArray, count: NpArray) -> NpArray:
    """Which part of each of `count` equal steps from low to high lies between 0 and 1."""
    step = (high - low) / count
    first = low + place * step
    return np.clip(np.minimum(first + step, 1) - np.maximum(first, 0), 0, None) / step
