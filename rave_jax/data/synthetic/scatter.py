"""Small shapes scattered over a picture, a digit on each, one asked: "Which digit is on the red circle?".

A list of all of them ("circle red7 square blue3", in any order; "red7 blue3" where there is one shape) is the warm-up,
as `mosaic_list` is for mosaics.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import canvas, digits, palette, shapes
from rave_jax.data.synthetic.base import Box, Question, Split, in_split
from rave_jax.typing import NpArray, UInt8

_DIGIT_HEIGHT = 0.62  # of the side of a shape
Writing = Literal["printed", "handwritten"]


@dataclass(frozen=True)
class Thing:
    """A shape with a digit on it.

    Attributes:
        kind, colour: numbers of its shape and of its colour.
        cell: of the grid that is not drawn, along the rows.
        shift: where the shape stands in the room its cell leaves, (down, right) in 0..1.
        digit: what is on it.
        picture: number of the handwritten picture of the digit; -1 where it is printed.
    """

    kind: int
    colour: int
    cell: int
    shift: tuple[float, float]
    digit: int
    picture: int


@dataclass(frozen=True)
class Mark:
    """A small shape without a digit. `place` is its middle, (down, right) in 0..1 of the picture."""

    kind: int
    colour: int
    place: tuple[float, float]


@dataclass(frozen=True)
class Scattered:
    """What a picture shows. Things lie over marks. `Question.target` is the numbers of the things asked for."""

    things: tuple[Thing, ...]
    marks: tuple[Mark, ...]

    @property
    def arrangement(self) -> tuple[tuple[int, int, int], ...]:
        """What makes two scenes the same apart from their digits and marks."""
        return tuple(sorted((thing.cell, thing.kind, thing.colour) for thing in self.things))


@dataclass(frozen=True)
class Scatter:
    """No two things of a picture have both shape and colour in common. Digits are independent of all else."""

    weight: float = 1.0
    """Share of this task in the mixture, relative to the other tasks."""
    min_objects: int = 6
    """Least number of things with a digit."""
    max_objects: int = 12
    """Greatest number of things with a digit: at most kinds x colours, and at most the cells of the grid."""
    kinds: int = 2
    """Shapes that occur: the first so many of circle, square, triangle and cross."""
    colours: int = 8
    """Colours that occur: the first so many of the palette."""
    grid: int = 4
    """Rows and columns of the grid of cells that things stand in. A finer grid makes them smaller."""
    size: float = 0.9
    """Side of a thing as part of its cell. The room that is left is where it may stand."""
    clutter: int = 0
    """Small shapes without a digit, of the same shapes and colours, under the things."""
    writing: Writing = "printed"
    """Digits of one printed font, or handwritten ones, of which the splits share none."""
    ask: Literal["one", "all"] = "one"
    """What is asked for: the digit of one thing, or a list of all things with their digits, in any order."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "a number above 0")
        require(1 <= self.kinds <= len(shapes.KINDS), "kinds", self.kinds, f"1 to {len(shapes.KINDS)}")
        require(2 <= self.colours <= len(palette.RGB), "colours", self.colours, f"2 to {len(palette.RGB)}")
        require(2 <= self.grid <= 12, "grid", self.grid, "2 to 12")
        require(0.4 <= self.size <= 1, "size", self.size, "0.4 to 1")
        require(0 <= self.clutter <= 200, "clutter", self.clutter, "0 to 200")
        least = f"1 to max_objects ({self.max_objects})"
        require(1 <= self.min_objects <= self.max_objects, "min_objects", self.min_objects, least)
        most = min(self.kinds * self.colours, self.grid**2)
        expected = f"at most {most}: a shape and colour ({self.kinds} x {self.colours}) and a cell of grid for each"
        require(self.max_objects <= most, "max_objects", self.max_objects, expected)

    @property
    def name(self) -> str:
        return "scatter"

    @property
    def min_image_size(self) -> int:
        return int(np.ceil(14 * self.grid / self.size))

    @property
    def max_questions(self) -> int:
        return self.min_objects if self.ask == "one" else 1

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Scattered, tuple[Question, ...]]:
        while True:
            number = int(rng.integers(self.min_objects, self.max_objects + 1))
            looks = rng.permutation(self.kinds * self.colours)[:number].tolist()
            cells = rng.permutation(self.grid**2)[:number].tolist()
            labels = rng.integers(10, size=number).tolist()
            shifts = rng.random((number, 2)).tolist()
            things = tuple(
                self._written(rng, split, Thing(*divmod(look, self.colours), cell, (down, right), label, -1))
                for look, cell, label, (down, right) in zip(looks, cells, labels, shifts, strict=True)
            )
            scene = Scattered(things, ())
            if in_split(scene.arrangement, split):
                break
        scene = dataclasses.replace(scene, marks=tuple(self._mark(rng) for _ in range(self.clutter)))
        order = tuple(rng.permutation(number).tolist())
        if self.ask == "all":
            return scene, (Question("Which digits are there?", "scatter.all", "exact_match", target=order),)
        return scene, tuple(
            Question(f"Which digit is on the {_name(things[target])}?", "scatter.one", "exact_match", target=(target,))
            for target in order[:count]
        )

    def _written(self, rng: np.random.Generator, split: Split, thing: Thing) -> Thing:
        """The thing with a picture of its digit, where digits are handwritten."""
        if self.writing == "printed":
            return thing
        return dataclasses.replace(thing, picture=digits.pick(rng, split, thing.digit))

    def _mark(self, rng: np.random.Generator) -> Mark:
        down, right = rng.random(2).tolist()
        return Mark(int(rng.integers(self.kinds)), int(rng.integers(self.colours)), (down, right))

    def answer(self, scene: Scattered, question: Question) -> str:
        asked = [scene.things[target] for target in question.target]
        if self.ask == "one":
            return str(asked[0].digit)
        # The colour stands right before the digit: by it alone a model finds one thing in few, and so begins to learn.
        names = [palette.NAMES[thing.colour] for thing in asked]
        if self.kinds > 1:
            names = [f"{shapes.KINDS[thing.kind]} {name}" for thing, name in zip(asked, names, strict=True)]
        return " ".join(f"{name}{thing.digit}" for thing, name in zip(asked, names, strict=True))

    def redeal(self, rng: np.random.Generator, split: Split, scene: Scattered, question: Question) -> Scattered:
        things = list(scene.things)
        target = question.target[int(rng.integers(len(question.target)))]
        old = things[target]
        new = dataclasses.replace(old, digit=(old.digit + int(rng.integers(1, 10))) % 10)
        things[target] = self._written(rng, split, new)
        return dataclasses.replace(scene, things=tuple(things))

    def evidence(self, scene: Scattered, question: Question, image_size: int) -> Box:
        """The shape with its digit; the box around all of them where all are asked for."""
        places = np.array([self._place(scene.things[target], image_size) for target in question.target])
        (left, top), (right, bottom) = places[:, :2].min(0), (places[:, :2] + places[:, 2:]).max(0)
        return float(left), float(top), float(right), float(bottom)

    def paint(self, scene: Scattered, image_size: int) -> UInt8[NpArray, "S S 3"]:
        picture = canvas.blank(image_size, palette.PAPER)
        small = max(3, round(image_size / self.grid * self.size / 3))
        for mark in scene.marks:
            top, left = (round(at * image_size - small / 2) for at in mark.place)
            canvas.stamp(picture, shapes.mask(mark.kind, small), top, left, palette.RGB[mark.colour])
        for thing in scene.things:
            left, top, side = self._place(thing, image_size)
            canvas.stamp(picture, shapes.mask(thing.kind, side), top, left, palette.RGB[thing.colour])
            ink = self._ink(thing, side)
            low = 0.62 if shapes.KINDS[thing.kind] == "triangle" else 0.5  # where a triangle is wide
            y, x = round(low * side - ink.shape[0] / 2), round((side - ink.shape[1]) / 2)
            canvas.stamp(picture, ink, top + min(y, side - ink.shape[0]), left + x, palette.INK)
        return picture

    def _ink(self, thing: Thing, side: int) -> UInt8[NpArray, "y x"]:
        height = round(_DIGIT_HEIGHT * side)
        if thing.picture >= 0:
            return digits.enlarged(height)[thing.picture]
        # The bundled font draws a digit about 0.73 of its size high.
        ink = canvas.text(str(thing.digit), round(height / 0.73), bold=True)
        return ink[ink.any(1)]

    def _place(self, thing: Thing, image_size: int) -> tuple[int, int, int]:
        """Left, top and side of a thing in pixels."""
        room = image_size / self.grid
        side = round(room * self.size)
        row, col = divmod(thing.cell, self.grid)
        down, right = thing.shift
        return round(col * room + right * (room - side)), round(row * room + down * (room - side)), side


def _name(thing: Thing) -> str:
    return f"{palette.NAMES[thing.colour]} {shapes.KINDS[thing.kind]}"
