"""Bar charts, asked by the colour of a bar or by the word under it: "What is the value of the red bar?"."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import canvas, palette
from rave_jax.data.synthetic.base import Box, Question, Split, in_split
from rave_jax.data.synthetic.words import WORDS
from rave_jax.typing import NpArray, UInt8

_BAR_COLOURS = 9  # all of the palette but gray, which the grid has
_GRID, _GRID_STRONG, _AXIS = (232, 232, 230), (198, 198, 196), (70, 70, 76)


@dataclass(frozen=True)
class Chart:
    """What a chart shows, from left to right. `labels` is empty where no words are printed.

    Attributes:
        width: part of its room that a bar takes.
    """

    colours: tuple[int, ...]
    values: tuple[int, ...]
    labels: tuple[str, ...]
    width: float


@dataclass(frozen=True)
class _Frame:
    """Where a chart stands in its picture, in pixels."""

    left: int
    top: int
    right: int
    bottom: int
    value_size: int
    tick_size: int
    label_size: int


@dataclass(frozen=True)
class BarChart:
    """Charts of a few bars with whole values, each from 1 to `max_value` with equal chances."""

    weight: float = 1.0
    """Share of this task in the mixture, relative to the other tasks."""
    min_bars: int = 2
    """Least number of bars."""
    max_bars: int = 5
    """Greatest number of bars."""
    max_value: int = 9
    """Greatest value of a bar, and the top of the axis."""
    marks: Literal["gridlines", "values", "both"] = "both"
    """How a value can be read: grid lines with numbers at the axis, the number above the bar, or both."""
    ask: tuple[Literal["colour", "label"], ...] = ("colour",)
    """How a question names a bar. With "label" every bar has a word under it."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "a number above 0")
        require(2 <= self.min_bars <= self.max_bars, "min_bars", self.min_bars, f"2 to max_bars ({self.max_bars})")
        require(self.max_bars <= _BAR_COLOURS, "max_bars", self.max_bars, f"at most {_BAR_COLOURS}")
        require(4 <= self.max_value <= 99, "max_value", self.max_value, "4 to 99")
        require(len(self.ask) > 0, "ask", self.ask, 'at least one of "colour" and "label"')

    @property
    def name(self) -> str:
        return "bar_chart"

    @property
    def min_image_size(self) -> int:
        return (34 if "label" in self.ask else 16) * self.max_bars

    @property
    def max_questions(self) -> int:
        return self.min_bars

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Chart, tuple[Question, ...]]:
        while True:
            bars = int(rng.integers(self.min_bars, self.max_bars + 1))
            colours = tuple(rng.permutation(_BAR_COLOURS)[:bars].tolist())
            values = tuple(rng.integers(1, self.max_value + 1, bars).tolist())
            if in_split((colours, values), split):
                break
        labels: tuple[str, ...] = ()
        if "label" in self.ask:
            known = WORDS[split].bars
            labels = tuple(known[i] for i in rng.permutation(len(known))[:bars])
        scene = Chart(colours, values, labels, float(rng.uniform(0.62, 0.86)))
        return scene, tuple(self._ask(rng, scene, bar) for bar in rng.permutation(bars)[:count].tolist())

    def _ask(self, rng: np.random.Generator, scene: Chart, bar: int) -> Question:
        by = self.ask[int(rng.integers(len(self.ask)))]
        if by == "colour":
            text = f"What is the value of the {palette.NAMES[scene.colours[bar]]} bar?"
        else:
            text = f"What is the value of {scene.labels[bar]}?"
        return Question(text, template=f"bar_chart.{by}", metric="relaxed_accuracy", target=bar)

    def answer(self, scene: Chart, question: Question) -> str:
        return str(scene.values[question.target])

    def redeal(self, rng: np.random.Generator, split: Split, scene: Chart, question: Question) -> Chart:
        old = scene.values[question.target]
        # Relaxed accuracy forgives 5 %: only values that it calls wrong are dealt.
        others = [v for v in range(1, self.max_value + 1) if abs(v - old) > 0.1 * old]
        values = list(scene.values)
        values[question.target] = others[int(rng.integers(len(others)))]
        return dataclasses.replace(scene, values=tuple(values))

    def evidence(self, scene: Chart, question: Question, image_size: int) -> Box:
        """The bar, and the number above it where there is one; at least a grid step high."""
        frame = self._frame(image_size)
        left, right = self._bar(scene, question.target, frame)
        top = self._height(scene.values[question.target], frame)
        if self.marks != "gridlines":
            mask = canvas.text(str(scene.values[question.target]), frame.value_size, bold=True)
            top -= mask.shape[0]
            middle = (left + right) / 2
            left = min(left, int(middle - mask.shape[1] / 2))
            right = max(right, int(middle + mask.shape[1] / 2 + 1))
        return float(left), float(max(top, 0)), float(right), float(frame.bottom)

    def paint(self, scene: Chart, image_size: int) -> UInt8[NpArray, "S S 3"]:
        frame = self._frame(image_size)
        picture = canvas.blank(image_size, palette.PAPER)
        if self.marks != "values":
            self._paint_grid(picture, frame)
        line = max(1, image_size // 160)
        for bar, value in enumerate(scene.values):
            left, right = self._bar(scene, bar, frame)
            top = self._height(value, frame)
            picture[top : frame.bottom, left:right] = palette.RGB[scene.colours[bar]]
            if self.marks != "gridlines":
                mask = canvas.text(str(value), frame.value_size, bold=True)
                y, x = top - mask.shape[0], (left + right - mask.shape[1]) // 2
                # No grid line goes through the number.
                picture[max(y, 0) : top, x : x + mask.shape[1]] = palette.PAPER
                canvas.stamp(picture, mask, y, x, palette.INK)
            if scene.labels:
                mask = canvas.text(scene.labels[bar], frame.label_size)
                place = (left + right - mask.shape[1]) // 2
                canvas.stamp(picture, mask, frame.bottom + line + 1, place, palette.INK)
        picture[frame.bottom : frame.bottom + line, frame.left : frame.right] = _AXIS
        picture[frame.top : frame.bottom + line, frame.left : frame.left + line] = _AXIS
        return picture

    def _frame(self, image_size: int) -> _Frame:
        value_size = max(11, image_size // 9) if self.marks != "gridlines" else 0
        tick_size = max(8, image_size // 13) if self.marks != "values" else 0
        label_size = max(10, image_size // 13) if "label" in self.ask else 0
        return _Frame(
            left=round(tick_size * (0.62 * len(str(self.max_value)) + 0.4)) + 2,
            top=max(round(1.25 * value_size), round(0.5 * tick_size), 2),
            right=image_size - 2,
            bottom=image_size - max(3, round(1.5 * label_size), round(0.3 * tick_size)),
            value_size=value_size,
            tick_size=tick_size,
            label_size=label_size,
        )

    def _bar(self, scene: Chart, bar: int, frame: _Frame) -> tuple[int, int]:
        room = (frame.right - frame.left - 2) / len(scene.values)
        left = frame.left + 2 + room * (bar + (1 - scene.width) / 2)
        return round(left), round(left + room * scene.width)

    def _height(self, value: int, frame: _Frame) -> int:
        return round(frame.bottom - (frame.bottom - frame.top) * value / self.max_value)

    def _paint_grid(self, picture: UInt8[NpArray, "S S 3"], frame: _Frame) -> None:
        """A line per step and a strong, numbered one per few steps."""
        step = next(s for s in (1, 2, 5, 10) if self.max_value <= 10 * s)
        numbered = step * (3 if self.max_value // step >= 6 else 2)
        for value in range(step, self.max_value + 1, step):
            strong = value % numbered == 0
            y = self._height(value, frame)
            picture[y, frame.left : frame.right] = _GRID_STRONG if strong else _GRID
            if strong:
                mask = canvas.text(str(value), frame.tick_size)
                canvas.stamp(picture, mask, y - mask.shape[0] // 2, frame.left - 1 - mask.shape[1], _AXIS)
