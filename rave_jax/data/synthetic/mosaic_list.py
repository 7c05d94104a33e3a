"""Handwritten digits on coloured cells, to be listed: "red7 blue3 green0", in any order of the colours.

A warm-up for `digit_mosaic`: a list has as many answers as the mosaic has cells, and each stands right behind the
colour that it belongs to, so that one step of attention, from that colour to its cell, finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import mosaic, palette
from rave_jax.data.synthetic.base import Box, Question, Split
from rave_jax.data.synthetic.mosaic import Mosaic, MosaicTask


@dataclass(frozen=True)
class MosaicList(MosaicTask):
    """Mosaics to be listed, in the order of cells in `Question.target`. Every cell has a colour of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_grid <= 3, "max_grid", self.max_grid, "at most 3: a colour for each cell")

    @property
    def name(self) -> str:
        return "mosaic_list"

    @property
    def max_questions(self) -> int:
        return 1

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Mosaic, tuple[Question, ...]]:
        scene = mosaic.draw(rng, split, self, unique_colours=True)
        order = tuple(rng.permutation(scene.rows * scene.cols).tolist())
        return scene, (Question("Which digits are there?", "mosaic_list.all", "exact_match", target=order),)

    def answer(self, scene: Mosaic, question: Question) -> str:
        return " ".join(f"{palette.NAMES[scene.colours[cell]]}{scene.label(cell)}" for cell in question.target)

    def evidence(self, scene: Mosaic, question: Question, image_size: int) -> Box:
        """The box around all cells."""
        edges = np.array([scene.edges(cell, image_size) for cell in question.target])
        (left, top), (right, bottom) = edges[:, :2].min(0).tolist(), edges[:, 2:].max(0).tolist()
        return float(left), float(top), float(right), float(bottom)

    def redeal(self, rng: np.random.Generator, split: Split, scene: Mosaic, question: Question) -> Mosaic:
        return scene.redealt(rng, split, question.target[int(rng.integers(len(question.target)))])
