"""Handwritten digits on coloured cells, asked by colour: "Which digit is on the red cell?"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import mosaic, palette
from rave_jax.data.synthetic.base import Question, Split
from rave_jax.data.synthetic.mosaic import Mosaic, MosaicTask


@dataclass(frozen=True)
class DigitMosaic(MosaicTask):
    """Mosaics asked by colour. Every cell of a mosaic has a colour of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_grid <= 3, "max_grid", self.max_grid, "at most 3: a colour for each cell")

    @property
    def name(self) -> str:
        return "digit_mosaic"

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Mosaic, tuple[Question, ...]]:
        scene = mosaic.draw(rng, split, self, unique_colours=True)
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
