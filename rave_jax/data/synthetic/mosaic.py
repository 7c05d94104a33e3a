"""The picture that `digit_mosaic` and `position_mosaic` share: handwritten digits on coloured cells."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from rave_jax.data.synthetic import canvas, digits, palette
from rave_jax.data.synthetic.base import Box, Split, in_split
from rave_jax.typing import NpArray, UInt8


@dataclass(frozen=True)
class Mosaic:
    """A grid of cells, numbered along the rows.

    Attributes:
        colours: number of each cell's colour in the palette.
        pictures: number of each cell's digit picture.
        shifts: where each digit stands in the room its cell leaves, (down, right) in 0..1.
    """

    rows: int
    cols: int
    colours: tuple[int, ...]
    pictures: tuple[int, ...]
    shifts: tuple[tuple[float, float], ...]

    @property
    def layout(self) -> tuple[int, int, tuple[int, ...]]:
        """What makes two mosaics the same apart from the digits on them."""
        return self.rows, self.cols, self.colours

    def label(self, cell: int) -> int:
        """The digit on a cell."""
        return int(digits.load()[1][self.pictures[cell]])

    def edges(self, cell: int, image_size: int) -> tuple[int, int, int, int]:
        """Pixel box of a cell: left, top, right, bottom."""
        row, col = divmod(cell, self.cols)
        top, bottom = (image_size * r // self.rows for r in (row, row + 1))
        left, right = (image_size * c // self.cols for c in (col, col + 1))
        return left, top, right, bottom


def draw(
    rng: np.random.Generator, split: Split, sides: tuple[int, int], unique_colours: bool, alike: bool = False
) -> Mosaic:
    """A mosaic whose layout and digit pictures belong to the split; digits are independent of all else.

    Args:
        sides: least and greatest number of rows and of columns.
        unique_colours: no colour twice in a mosaic.
        alike: one digit, in different hands, on all cells.
    """
    while True:
        rows, cols = (int(n) for n in rng.integers(sides[0], sides[1] + 1, 2))
        cells = rows * cols
        if unique_colours:
            colours = rng.permutation(len(palette.RGB))[:cells]
        else:
            colours = rng.integers(len(palette.RGB), size=cells)
        chosen = tuple(colours.tolist())
        if in_split((rows, cols, chosen), split):
            break
    labels = rng.integers(10, size=1 if alike else cells).tolist() * (cells if alike else 1)
    pictures = tuple(digits.pick(rng, split, label) for label in labels)
    shifts = tuple((down, right) for down, right in rng.random((cells, 2)).tolist())
    return Mosaic(rows, cols, chosen, pictures, shifts)


def box(scene: Mosaic, cell: int, image_size: int) -> Box:
    """Evidence box of a cell."""
    left, top, right, bottom = scene.edges(cell, image_size)
    return float(left), float(top), float(right), float(bottom)


def redeal(rng: np.random.Generator, split: Split, scene: Mosaic, cell: int) -> Mosaic:
    """The mosaic with a picture of another digit on one cell."""
    label = (scene.label(cell) + int(rng.integers(1, 10))) % 10
    pictures = list(scene.pictures)
    pictures[cell] = digits.pick(rng, split, label)
    return dataclasses.replace(scene, pictures=tuple(pictures))


def paint(scene: Mosaic, image_size: int) -> UInt8[NpArray, "S S 3"]:
    """Cells side by side with thin lines between them, a digit in black ink on each."""
    picture = canvas.blank(image_size, palette.PAPER)
    line = max(1, image_size // 84)
    for cell, (colour, number, (down, right)) in enumerate(
        zip(scene.colours, scene.pictures, scene.shifts, strict=True)
    ):
        x1, y1, x2, y2 = scene.edges(cell, image_size)
        picture[y1 : y2 - line, x1 : x2 - line] = palette.RGB[colour]
        size = (min(x2 - x1, y2 - y1) - line) * 15 // 16
        top = y1 + round(down * (y2 - y1 - line - size))
        left = x1 + round(right * (x2 - x1 - line - size))
        canvas.stamp(picture, digits.enlarged(size)[number], top, left, palette.INK)
    return picture
