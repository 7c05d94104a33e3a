"""Counting the shapes of a colour, of a kind, or of both: "How many red circles are there?"."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import canvas, palette, shapes
from rave_jax.data.synthetic.base import Box, Question, Split, in_split
from rave_jax.typing import NpArray, UInt8

_PLURALS = ("circles", "squares", "triangles", "crosses")
_COLOURS = 8  # of the palette, without brown and gray
Thing = tuple[int, int]  # kind, colour
Wanted = tuple[int | None, int | None]  # kind, colour; None is any


@dataclass(frozen=True)
class Shapes:
    """Shapes on a square grid that is not drawn; cells are numbered along the rows.

    Attributes:
        things: what each cell holds; None is nothing.
        sizes: side of a cell's shape as part of the cell.
        shifts: where the shape stands in the room its cell leaves, (down, right) in 0..1.
    """

    things: tuple[Thing | None, ...]
    sizes: tuple[float, ...]
    shifts: tuple[tuple[float, float], ...]

    @property
    def side(self) -> int:
        """Rows and columns of the grid."""
        return round(len(self.things) ** 0.5)

    def cells(self, wanted: Wanted) -> list[int]:
        """The cells whose shape is of the wanted kind and colour."""
        return [cell for cell, thing in enumerate(self.things) if thing is not None and _fits(thing, wanted)]

    def box(self, cell: int, image_size: int) -> tuple[int, int, int, int]:
        """Pixel box of a cell's shape: left, top, right, bottom."""
        room = image_size / self.side
        size = round(room * self.sizes[cell])
        row, col = divmod(cell, self.side)
        down, right = self.shifts[cell]
        top, left = round(row * room + down * (room - size)), round(col * room + right * (room - size))
        return left, top, left + size, top + size


def _fits(thing: Thing, wanted: Wanted) -> bool:
    return all(want is None or have == want for have, want in zip(thing, wanted, strict=True))


@dataclass(frozen=True)
class Counting:
    """Counts from 0 to `max_count`. Every count is as likely as every other for the first question."""

    weight: float = 1.0
    """Share of this task in the mixture, relative to the other tasks."""
    grid: int = 3
    """Rows and columns of the grid of cells; each cell holds at most one shape."""
    max_count: int = 5
    """Greatest count that is asked for."""
    ask: tuple[Literal["colour", "kind", "both"], ...] = ("colour", "kind")
    """What a question counts: shapes of one colour, of one kind, or of one colour and kind."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "a number above 0")
        require(2 <= self.grid <= 8, "grid", self.grid, "2 to 8")
        require(1 <= self.max_count <= self.grid**2, "max_count", self.max_count, f"1 to {self.grid**2}, the cells")
        require(len(self.ask) > 0, "ask", self.ask, 'at least one of "colour", "kind" and "both"')

    @property
    def name(self) -> str:
        return "counting"

    @property
    def min_image_size(self) -> int:
        return 16 * self.grid

    @property
    def max_questions(self) -> int:
        return 2

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Shapes, tuple[Question, ...]]:
        cells = self.grid**2
        while True:
            by = self.ask[int(rng.integers(len(self.ask)))]
            wanted = self._wanted(rng, by, count)
            things: list[Thing | None] = []
            for want in wanted:
                most = min(self.max_count, cells - len(things))
                things += [self._thing(rng, want) for _ in range(int(rng.integers(most + 1)))]
            others = int(rng.integers(0 if things else 1, cells - len(things) + 1)) if len(things) < cells else 0
            things += [self._other(rng, wanted) for _ in range(others)]
            things += [None] * (cells - len(things))
            placed = tuple(things[i] for i in rng.permutation(cells))
            if in_split(placed, split):
                break
        sizes = tuple(rng.uniform(0.6, 0.82, cells).tolist())
        shifts = tuple((down, right) for down, right in rng.uniform(0.1, 0.9, (cells, 2)).tolist())
        # The first count drawn is the uniform one, so its question comes last: that one is scored.
        asked = tuple(
            Question(_text(want), template=f"counting.{by}", metric="exact_match", target=want)
            for want in reversed(wanted)
        )
        return Shapes(placed, sizes, shifts), asked

    def _wanted(self, rng: np.random.Generator, by: str, count: int) -> list[Wanted]:
        kinds = rng.permutation(len(shapes.KINDS))[:count].tolist()
        colours = rng.permutation(_COLOURS)[:count].tolist()
        return [
            (None if by == "colour" else kind, None if by == "kind" else colour)
            for kind, colour in zip(kinds, colours, strict=True)
        ]

    def _thing(self, rng: np.random.Generator, wanted: Wanted) -> Thing:
        kind, colour = int(rng.integers(len(shapes.KINDS))), int(rng.integers(_COLOURS))
        return kind if wanted[0] is None else wanted[0], colour if wanted[1] is None else wanted[1]

    def _other(self, rng: np.random.Generator, wanted: list[Wanted]) -> Thing:
        """A shape that is not wanted; where both kind and colour are asked, often half right."""
        while True:
            near = wanted[int(rng.integers(len(wanted)))]
            kept = int(rng.integers(3))
            thing = self._thing(rng, (near[0] if kept == 0 else None, near[1] if kept == 1 else None))
            if not any(_fits(thing, want) for want in wanted):
                return thing

    def answer(self, scene: Shapes, question: Question) -> str:
        return str(len(scene.cells(question.target)))

    def evidence(self, scene: Shapes, question: Question, image_size: int) -> Box:
        """The box around the counted shapes; the whole picture where there are none to count."""
        boxes = np.array([scene.box(cell, image_size) for cell in scene.cells(question.target)])
        if not len(boxes):
            return 0.0, 0.0, float(image_size), float(image_size)
        left, top = boxes[:, :2].min(0).tolist()
        right, bottom = boxes[:, 2:].max(0).tolist()
        return float(left), float(top), float(right), float(bottom)

    def redeal(self, rng: np.random.Generator, split: Split, scene: Shapes, question: Question) -> Shapes:
        counted = scene.cells(question.target)
        rest = [cell for cell in range(len(scene.things)) if cell not in counted]
        counts = [count for count in range(self.max_count + 1) if count != len(counted)]
        new = counts[int(rng.integers(len(counts)))]
        things = list(scene.things)
        for cell in rng.permutation(counted)[: max(0, len(counted) - new)].tolist():
            things[cell] = self._other(rng, [question.target])
        for cell in rng.permutation(rest)[: max(0, new - len(counted))].tolist():
            things[cell] = self._thing(rng, question.target)
        return dataclasses.replace(scene, things=tuple(things))

    def paint(self, scene: Shapes, image_size: int) -> UInt8[NpArray, "S S 3"]:
        picture = canvas.blank(image_size, palette.PAPER)
        for cell, thing in enumerate(scene.things):
            if thing is not None:
                left, top, right, _ = scene.box(cell, image_size)
                canvas.stamp(picture, shapes.mask(thing[0], right - left), top, left, palette.RGB[thing[1]])
        return picture


def _text(wanted: Wanted) -> str:
    kind, colour = wanted
    noun = "shapes" if kind is None else _PLURALS[kind]
    return f"How many {noun} are there?" if colour is None else f"How many {palette.NAMES[colour]} {noun} are there?"
