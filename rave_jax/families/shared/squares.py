"""Pictures made into squares of one size."""

from __future__ import annotations

import numpy as np
from PIL import Image

from rave_jax.families.pictures import PictureError
from rave_jax.layout import Box
from rave_jax.typing import NpArray, UInt8

MAX_ASPECT = 200


def check_aspect(height: int, width: int) -> None:
    """Refuse an empty picture and one that is much longer than wide: it would be resized to very many pixels.

    Raises:
        PictureError: it is one.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise PictureError(
            f"{width} x {height} pixels: the sides must be within a factor of {MAX_ASPECT} of each other"
        )


def squared(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """The picture in the middle of a square of its longer side, which has the mean colour."""
    side = max(image.size)
    colour = tuple(int(x * 255) for x in mean)
    square = Image.new("RGB", (side, side), (colour[0], colour[1], colour[2]))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def square_of(height: int, width: int) -> Box:
    """The square that `squared` makes of a picture, in fractions of the picture."""
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return -left / width, -top / height, (side - left) / width, (side - top) / height


def middle_of(height: int, width: int, side: int) -> Box:
    """The square that `middle` cuts out of a picture, in fractions of the picture."""
    top, left = (out.start - into.start for into, out in (_middle(length, side) for length in (height, width)))
    return left / width, top / height, (left + side) / width, (top + side) / height


def middle(pixels: UInt8[NpArray, "H W 3"], side: int) -> UInt8[NpArray, "side side 3"]:
    """The square in the middle of a picture, with black where the picture is smaller."""
    whole = np.zeros((side, side, 3), np.uint8)
    into, out = zip(*(_middle(length, side) for length in pixels.shape[:2]), strict=True)
    whole[into] = pixels[out]
    return whole


def _middle(length: int, side: int) -> tuple[slice, slice]:
    """Which part of the square is filled, from which part of the picture."""
    if length >= side:
        start = (length - side) // 2
        return slice(0, side), slice(start, start + side)
    start = -(-(side - length) // 2)
    return slice(start, start + length), slice(0, length)
