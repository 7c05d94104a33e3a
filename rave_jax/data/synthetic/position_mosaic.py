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

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_grid <= 9, "max_grid", self.max_grid, "at most 9")

    @property
    def name(self) -> str:
        return "position_mosaic"

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Mosaic, tuple[Question, ...]]:
        scene = mosaic.draw(rng, split, self, unique_colours=False)
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
