"""The named shapes of the synthetic pictures, as masks of ink."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw

from rave_jax.typing import NpArray, UInt8

KINDS = ("circle", "square", "triangle", "cross")


@functools.lru_cache(maxsize=1024)
def mask(kind: int, size: int) -> UInt8[NpArray, "size size"]:
    """A shape that fills its square, with soft edges."""
    n = 8 * size
    image = Image.new("L", (n, n))
    pen = ImageDraw.Draw(image)
    match KINDS[kind]:
        case "circle":
            pen.ellipse((0, 0, n - 1, n - 1), fill=255)
        case "square":
            pen.rectangle((n * 0.06, n * 0.06, n * 0.94, n * 0.94), fill=255)
        case "triangle":
            pen.polygon(((n / 2, 0), (n, n), (0, n)), fill=255)
        case _:
            pen.rectangle((n * 0.34, 0, n * 0.66, n), fill=255)
            pen.rectangle((0, n * 0.34, n, n * 0.66), fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))
