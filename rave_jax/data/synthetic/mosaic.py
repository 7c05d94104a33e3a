"""The picture that the mosaic tasks share: handwritten digits on coloured cells.

Cells have one size whatever their number: a mosaic of few cells stands somewhere on the frame, with paper around it.
The frame is what the largest one fills, or larger.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import canvas, digits, palette
from rave_jax.data.synthetic.base import Box, Question, Split, in_split
from rave_jax.typing import NpArray, UInt8


@dataclass(frozen=True)
class Mosaic:
    """A grid of cells, numbered along the rows.

    Attributes:
        frame: cells along a side of the picture.
        corner: row and column of the frame where the first cell stands.
        colours: number of each cell's colour in the palette.
        pictures: number of each cell's digit picture.
        shifts: where each digit stands in the room its cell leaves, (down, right) in 0..1.
    """

    rows: int
    cols: int
    frame: int
    corner: tuple[int, int]
    colours: tuple[int, ...]
    pictures: tuple[int, ...]
    shifts: tuple[tuple[float, float], ...]

    @property
    def arrangement(self) -> tuple[int, int, tuple[int, ...]]:
        """What makes two mosaics the same apart from the digits on them."""
        return self.rows, self.cols, self.colours

    def label(self, cell: int) -> int:
        """The digit on a cell."""
        return int(digits.load()[1][self.pictures[cell]])

    def edges(self, cell: int, image_size: int) -> tuple[int, int, int, int]:
        """Pixel box of a cell: left, top, right, bottom."""
        row, col = (own + first for own, first in zip(divmod(cell, self.cols), self.corner, strict=True))
        top, bottom = (image_size * r // self.frame for r in (row, row + 1))
        left, right = (image_size * c // self.frame for c in (col, col + 1))
        return left, top, right, bottom

    def redealt(self, rng: np.random.Generator, split: Split, cell: int) -> Mosaic:
        """The mosaic with a picture of another digit on one cell."""
        label = (self.label(cell) + int(rng.integers(1, 10))) % 10
        pictures = list(self.pictures)
        pictures[cell] = digits.pick(rng, split, label)
        return dataclasses.replace(self, pictures=tuple(pictures))


def draw(rng: np.random.Generator, split: Split, task: MosaicTask, unique_colours: bool) -> Mosaic:
    """A mosaic whose arrangement and digit pictures belong to the split; digits are independent of all else.

    Args:
        task: says how many rows and columns, and the side of the frame.
        unique_colours: no colour twice in a mosaic.
    """
    side = task.side
    while True:
        rows, cols = (int(n) for n in rng.integers(task.min_grid, task.max_grid + 1, 2))
        cells = rows * cols
        if unique_colours:
            colours = rng.permutation(len(palette.RGB))[:cells]
        else:
            colours = rng.integers(len(palette.RGB), size=cells)
        chosen = tuple(colours.tolist())
        if in_split((rows, cols, chosen), split):
            break
    pictures = tuple(digits.pick(rng, split, label) for label in rng.integers(10, size=cells).tolist())
    shifts = tuple((down, right) for down, right in rng.random((cells, 2)).tolist())
    corner = int(rng.integers(side - rows + 1)), int(rng.integers(side - cols + 1))
    return Mosaic(rows, cols, side, corner, chosen, pictures, shifts)


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


@dataclass(frozen=True)
class MosaicTask:
    """What the mosaic tasks share. Unless a task says otherwise, `Question.target` is the number of a cell."""

    weight: float = 1.0
    """Share of this task in the mixture, relative to the other tasks."""
    min_grid: int = 2
    """Least number of rows and of columns."""
    max_grid: int = 3
    """Greatest number of rows and of columns."""
    frame: int | None = None
    """Cells along a side of the picture, of which a mosaic fills some; None: as many as the largest has."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "a number above 0")
        require(2 <= self.min_grid <= self.max_grid, "min_grid", self.min_grid, f"2 to max_grid ({self.max_grid})")
        require(self.side >= self.max_grid, "frame", self.frame, f"max_grid ({self.max_grid}) or more")

    @property
    def side(self) -> int:
        """Cells along a side of the picture."""
        return self.max_grid if self.frame is None else self.frame

    @property
    def min_image_size(self) -> int:
        return 16 * self.side

    @property
    def max_questions(self) -> int:
        return self.min_grid**2

    def answer(self, scene: Mosaic, question: Question) -> str:
        return str(scene.label(question.target))

    def evidence(self, scene: Mosaic, question: Question, image_size: int) -> Box:
        left, top, right, bottom = scene.edges(question.target, image_size)
        return float(left), float(top), float(right), float(bottom)

    def redeal(self, rng: np.random.Generator, split: Split, scene: Mosaic, question: Question) -> Mosaic:
        return scene.redealt(rng, split, question.target)

    def paint(self, scene: Mosaic, image_size: int) -> UInt8[NpArray, "S S 3"]:
        return paint(scene, image_size)
