"""Handwritten digits on coloured cells, asked by place: "Which digit is in row 2, column 1?"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import mosaic
from rave_jax.data.synthetic.base import Question, Split
from rave_jax.data.synthetic.mosaic import Mosaic, MosaicTask


@dataclass(frozen=True)
class PositionMosaic(MosaicTask):
    """Mosaics asked by row and column, counted from 1 at the top left. Colours say nothing here."""

    weight: float = 1.0
    """Share of this task in the mixture, relative to the other tasks."""
    min_grid: int = 2
    """Least number of rows and of columns."""
    max_grid: int = 3
    """Greatest number of rows and of columns."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "a number above 0")
        require(2 <= self.min_grid <= self.max_grid, "min_grid", self.min_grid, f"2 to max_grid ({self.max_grid})")
        require(self.max_grid <= 9, "max_grid", self.max_grid, "at most 9")

    @property
    def name(self) -> str:
        return "position_mosaic"

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Mosaic, tuple[Question, ...]]:
        scene = mosaic.draw(rng, split, (self.min_grid, self.max_grid), unique_colours=False)
        cells = rng.permutation(scene.rows * scene.cols)[:count].tolist()
        return scene, tuple(
            Question(
                text=f"Which digit is in row {cell // scene.cols + 1}, column {cell % scene.cols + 1}?",
                template="position_mosaic.row_column",
                metric="exact_match",
                target=cell,
            )
            for cell in cells
        )
