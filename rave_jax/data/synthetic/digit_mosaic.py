"""Handwritten digits on coloured cells, asked by colour: "Which digit is on the red cell?"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import mosaic, palette
from rave_jax.data.synthetic.base import Box, Question, Split
from rave_jax.data.synthetic.mosaic import Mosaic
from rave_jax.typing import NpArray, UInt8


@dataclass(frozen=True)
class DigitMosaic:
    """Mosaics asked by colour. Every cell of a mosaic has a colour of its own."""

    weight: float = 1.0
    """Share of this task in the mixture, relative to the other tasks."""
    min_grid: int = 2
    """Least number of rows and of columns."""
    max_grid: int = 3
    """Greatest number of rows and of columns."""
    alike: bool = False
    """Does one digit stand on all cells? A warm-up: the digit can be read before the colours are understood."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "a number above 0")
        require(2 <= self.min_grid <= self.max_grid, "min_grid", self.min_grid, f"2 to max_grid ({self.max_grid})")
        require(self.max_grid <= 3, "max_grid", self.max_grid, "at most 3: a colour for each cell")

    @property
    def name(self) -> str:
        return "digit_mosaic"

    @property
    def min_image_size(self) -> int:
        return 16 * self.max_grid

    @property
    def max_questions(self) -> int:
        return self.min_grid**2

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Mosaic, tuple[Question, ...]]:
        scene = mosaic.draw(rng, split, (self.min_grid, self.max_grid), unique_colours=True, alike=self.alike)
        cells = rng.permutation(scene.rows * scene.cols)[:count].tolist()
        return scene, tuple(
            Question(
                text=f"Which digit is on the {palette.NAMES[scene.colours[cell]]} cell?",
                template="digit_mosaic.colour",
                metric="exact_match",
                target=cell,
            )
            for cell in cells
        )

    def answer(self, scene: Mosaic, question: Question) -> str:
        return str(scene.label(question.target))

    def evidence(self, scene: Mosaic, question: Question, image_size: int) -> Box:
        return mosaic.box(scene, question.target, image_size)

    def redeal(self, rng: np.random.Generator, split: Split, scene: Mosaic, question: Question) -> Mosaic:
        return mosaic.redeal(rng, split, scene, question.target)

    def paint(self, scene: Mosaic, image_size: int) -> UInt8[NpArray, "S S 3"]:
        return mosaic.paint(scene, image_size)
