"""Painting on uint8 [height, width, 3] pictures with masks of ink, and text as such masks."""

from __future__ import annotations

import functools

import numpy as np
from PIL import ImageFont

from rave_jax.typing import NpArray, UInt8

Colour = tuple[int, int, int]


def blank(image_size: int, colour: Colour) -> UInt8[NpArray, "S S 3"]:
    """A square picture of one colour."""
    return np.full((image_size, image_size, 3), colour, np.uint8)


def stamp(picture: UInt8[NpArray, "Y X 3"], mask: UInt8[NpArray, "y x"], top: int, left: int, colour: Colour) -> None:
    """Paint `colour` through `mask` (255 covers) in place. What would fall outside the picture is left off."""
    y, x = max(top, 0), max(left, 0)
    place = picture[y : top + mask.shape[0], x : left + mask.shape[1]]
    shown = mask[y - top :, x - left :][: place.shape[0], : place.shape[1]].astype(np.int32)[:, :, None]
    under = place.astype(np.int32)
    place[:] = under + ((np.asarray(colour, np.int32) - under) * shown + 127) // 255


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, so its bundled scalable font cannot be used")
    return font


@functools.lru_cache(maxsize=8192)
def text(words: str, size: int, bold: bool = False) -> UInt8[NpArray, "y x"]:
    """Ink of one line in Pillow's bundled font at `size` pixels; every line of a size has the same height.

    Columns without ink at both ends are cut off, so a mask is as wide as what is seen of it.
    """
    font = _font(size)
    ascent, descent = font.getmetrics()
    ink, (_, top) = font.getmask2(words, mode="L", anchor="ls")
    glyphs = np.asarray(ink, np.uint8).reshape(ink.size[1], ink.size[0])
    mask = np.zeros((ascent + descent, glyphs.shape[1]), np.uint8)
    y = ascent + top
    shown = glyphs[max(0, -y) : mask.shape[0] - y]
    mask[max(0, y) : max(0, y) + shown.shape[0]] = shown
    if bold:
        # The bundled font has one weight: strokes are made thicker by half a pixel to a pixel at the right.
        padded = np.pad(mask, ((0, 0), (0, 1)))
        thicker = np.pad(mask, ((0, 0), (1, 0))) * min(1.0, 0.5 + size / 40)
        mask = np.maximum(padded, thicker.astype(np.uint8))
    inked = np.flatnonzero(mask.any(0))
    return mask[:, inked[0] : inked[-1] + 1] if len(inked) else mask
