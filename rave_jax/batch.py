"""One batch: static shapes, zero to n images per row, several documents per row.

`data` writes these with numpy and `attention` and `models` read them under jit, so they live below
both, in plain NamedTuples: a NamedTuple is a jax pytree without importing jax, and loader workers can
fork safely. A mechanism reads `TokenInfo` and nothing else about the prompt.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from rave_jax.typing import Array, Float, Int, UInt8


class Kind(IntEnum):
    """What a token is."""

    PAD = 0
    TEXT = 1
    VISUAL = 2
    CONTEXT = 3


class Role(IntEnum):
    """Which role a token belongs to. Visual tokens carry the role of the message that holds the image."""

    NONE = 0
    SYSTEM = 1
    QUESTION = 2
    RESPONSE = 3


class TokenInfo(NamedTuple):
    """What mechanisms can read about each token. Every field is int32 [B,T].

    Fields:
        document: packed document in the row, counted from 1; 0 is padding.
        offset: how many tokens of its document stand before the token. Tokens of a picture may lie in another order,
            region by region; masks go by the offset.
        kind: a `Kind`.
        role: a `Role`.
        turn: number of the user turn in the document, counted from 1; 0 before the first.
        image: image or video in the row, counted from 1, on its visual and context tokens; 0 elsewhere.
        row, col, frame: place of a visual token in its merged grid, from 0. Of a context token, `row` is which of its
            frame's (or image's) it is, and `frame` its frame (or the last).
        grid_t, grid_h, grid_w: size of that merged grid; 0 where `image` is.
        region: region of a visual token in the row, counted from 1; 0 for other tokens, and where no mechanism of the
            model asks for regions.
        padded: 1 on a visual token that shows more of the border that was added to a picture than of the picture; else
            0.
    """

    document: Int[Array, "B T"]
    offset: Int[Array, "B T"]
    kind: Int[Array, "B T"]
    role: Int[Array, "B T"]
    turn: Int[Array, "B T"]
    image: Int[Array, "B T"]
    row: Int[Array, "B T"]
    col: Int[Array, "B T"]
    frame: Int[Array, "B T"]
    grid_t: Int[Array, "B T"]
    grid_h: Int[Array, "B T"]
    grid_w: Int[Array, "B T"]
    region: Int[Array, "B T"]
    padded: Int[Array, "B T"]


UNMIXED: Any = np.zeros((0, 0), np.int32)
"""`Patches.source` and `weight` of a document of a family whose merge units are visual tokens as they are."""
UNMIXED.setflags(write=False)


class Patches(NamedTuple):
    """Patches of the pictures of one document [P, ...], or of rows [B,P, ...] with padding behind them.

    The patches of a merge unit stay together, and inside a frame merge units stand window by window. All counting is
    on within the row (of an example: the document), so that no two frames or windows share a number.

    Fields:
        pixels: pixel values 0..255 of each patch, flattened as (channel, temporal, row, col).
        frame: the patch's frame, counted from 1; 0 is padding. Full attention blocks of the tower see one frame.
        place: (row, col) of the patch in its frame's patch grid, from 0.
        window: the patch's attention window, counted from 1; 0 is padding. Windows are contiguous and ascending. For a
            tower without windows, the picture: what must go through the tower together.
        source: of a family whose visual tokens are not its merge units, M visual tokens in the order of the document,
            the K merge units of its picture (`PatchSizes.mixed`) that each is a sum of; -1, in the first place alone
            where K is above 1, is a row that the model has learned, such as what ends a line of a picture. M and K are
            0 for all other families.
        weight: what these units are multiplied by; 0 is padding.
    """

    pixels: UInt8[Array, "*B P C"]
    frame: Int[Array, "*B P"]
    place: Int[Array, "*B P 2"]
    window: Int[Array, "*B P"]
    source: Int[Array, "*B M K"] = UNMIXED
    weight: Float[Array, "*B M K"] = UNMIXED

    @property
    def length(self) -> int:
        """P: patches of the document, or of a row with its padding. (`len` counts the fields.)"""
        return self.frame.shape[-1]


class Batch(NamedTuple):
    """What one forward and one training step read.

    Fields:
        tokens: token ids; visual tokens hold the family's image (or video) placeholder id.
        targets: the id each position predicts (tokens shifted left inside a document).
        loss_weights: weight of each prediction, 0 where there is none to learn.
        info: token codes.
        positions: rotary position of each token: temporal, height, width.
        visual_index: for a visual token, which merged patch of the row it is, counted from 0 (the
            patches of merge unit n stand at n*u .. n*u + u - 1, u = `TowerConfig.merge_unit`), or where units are
            mixed, which of `patches.source`; 0 else.
        patches: patches of the row's pictures.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    loss_weights: Float[Array, "B T"]
    info: TokenInfo
    positions: Int[Array, "3 B T"]
    visual_index: Int[Array, "B T"]
    patches: Patches
