"""Two to four mosaics with letters, of which one is asked: "Which digit is on the red cell in B?".

A list of all cells ("A red7 blue3 B blue0 red1", in any order inside a picture) is the warm-up.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import digits, mosaic, palette
from rave_jax.data.synthetic.base import LABELS, Box, Question, Split, in_split
from rave_jax.data.synthetic.mosaic import Mosaic, MosaicTask
from rave_jax.typing import NpArray, UInt8

Scene = tuple[Mosaic, ...]


@dataclass(frozen=True)
class Album:
    """Mosaics of one size side by side in a conversation. Every cell of a mosaic has a colour of its own."""

    weight: float = 1.0
    """Share of this task in the mixture, relative to the other tasks."""
    min_pictures: int = 2
    """Least number of pictures."""
    max_pictures: int = 4
    """Greatest number of pictures."""
    min_grid: int = 2
    """Least number of rows and of columns of a mosaic."""
    max_grid: int = 2
    """Greatest number of rows and of columns of a mosaic."""
    same_colours: bool = True
    """All pictures have the same colours, in other places: who finds the colour still has to find the picture."""
    ask: Literal["one", "all"] = "one"
    """What is asked for: the digit of one cell, or a list of all pictures with their colours and digits."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "a number above 0")
        most = len(LABELS)
        require(self.max_pictures <= most, "max_pictures", self.max_pictures, f"at most {most}")
        least = f"1 to max_pictures ({self.max_pictures})"
        require(1 <= self.min_pictures <= self.max_pictures, "min_pictures", self.min_pictures, least)
        require(self.max_grid <= 3, "max_grid", self.max_grid, "at most 3: a colour for each cell")
        require(2 <= self.min_grid <= self.max_grid, "min_grid", self.min_grid, f"2 to max_grid ({self.max_grid})")

    @property
    def name(self) -> str:
        return "album"

    @property
    def min_image_size(self) -> int:
        return self._mosaics.min_image_size

    @property
    def max_questions(self) -> int:
        return self.min_pictures * self.min_grid**2 if self.ask == "one" else 1

    @property
    def _mosaics(self) -> MosaicTask:
        return MosaicTask(min_grid=self.min_grid, max_grid=self.max_grid)

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Scene, tuple[Question, ...]]:
        number = int(rng.integers(self.min_pictures, self.max_pictures + 1))
        scene = tuple(mosaic.draw(rng, split, self._mosaics, unique_colours=True) for _ in range(number))
        if self.same_colours:
            scene = (scene[0], *(_shuffled(rng, split, scene[0]) for _ in scene[1:]))
        places = [(picture, cell) for picture, one in enumerate(scene) for cell in range(len(one.colours))]
        if self.ask == "all":
            order = [p for n in range(number) for p in rng.permutation([q for q in places if q[0] == n]).tolist()]
            target = tuple((picture, cell) for picture, cell in order)
            return scene, (Question("Which digits are there?", "album.all", "exact_match", target),)
        asked = [places[i] for i in rng.permutation(len(places))[:count].tolist()]
        return scene, tuple(
            Question(
                text=f"Which digit is on the {palette.NAMES[scene[picture].colours[cell]]} cell in {LABELS[picture]}?",
                template="album.one",
                metric="exact_match",
                target=((picture, cell),),
                picture=picture,
            )
            for picture, cell in asked
        )

    def answer(self, scene: Scene, question: Question) -> str:
        if self.ask == "one":
            ((picture, cell),) = question.target
            return str(scene[picture].label(cell))
        words = []
        for number, (picture, cell) in enumerate(question.target):
            if number == 0 or question.target[number - 1][0] != picture:
                words.append(LABELS[picture])
            words.append(f"{palette.NAMES[scene[picture].colours[cell]]}{scene[picture].label(cell)}")
        return " ".join(words)

    def redeal(self, rng: np.random.Generator, split: Split, scene: Scene, question: Question) -> Scene:
        picture, cell = question.target[int(rng.integers(len(question.target)))]
        new = scene[picture].redealt(rng, split, cell)
        return (*scene[:picture], new, *scene[picture + 1 :])

    def evidence(self, scene: Scene, question: Question, image_size: int) -> Box:
        """The cell, in the picture that is asked for; of a list, the box around the cells of the first picture."""
        edges = np.array([scene[p].edges(c, image_size) for p, c in question.target if p == question.picture])
        (left, top), (right, bottom) = edges[:, :2].min(0), edges[:, 2:].max(0)
        return float(left), float(top), float(right), float(bottom)

    def paint(self, scene: Scene, image_size: int) -> UInt8[NpArray, "N S S 3"]:
        """The pictures in their order."""
        return np.stack([mosaic.paint(one, image_size) for one in scene])


def _shuffled(rng: np.random.Generator, split: Split, like: Mosaic) -> Mosaic:
    """A mosaic of the split with the colours of another in any order, and digits of its own."""
    while True:
        colours = tuple(like.colours[i] for i in rng.permutation(len(like.colours)).tolist())
        one = dataclasses.replace(like, colours=colours)
        if in_split(one.arrangement, split):  # in its own order it is, so this ends
            break
    cells = len(colours)
    pictures = tuple(digits.pick(rng, split, label) for label in rng.integers(10, size=cells).tolist())
    shifts = tuple((down, right) for down, right in rng.random((cells, 2)).tolist())
    corner = int(rng.integers(like.frame - like.rows + 1)), int(rng.integers(like.frame - like.cols + 1))
    return dataclasses.replace(one, pictures=pictures, shifts=shifts, corner=corner)
