"""Long receipts in a tall picture: a code and a price to a line, one line asked: "What is the price of K?".

A list of all lines ("K3 B7", in any order) is the warm-up, as `mosaic_list` is for mosaics.
"""

from __future__ import annotations

import dataclasses
import string
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import canvas, palette
from rave_jax.data.synthetic.base import Box, Question, Split, in_split
from rave_jax.typing import NpArray, UInt8

_FAINT = (150, 150, 156)
_LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Lines:
    """What a receipt says, from the top.

    Attributes:
        codes: of the goods, all different.
        prices: of the same.
        others: numbers that stand between code and price on each line.
        first: the line of the picture on which the first stands.
    """

    codes: tuple[str, ...]
    prices: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]
    first: int


@dataclass(frozen=True)
class LongReceipt:
    """Receipts of many lines. `Question.target` is the numbers of the lines asked for, from the top."""

    weight: float = 1.0
    """Share of this task in the mixture, relative to the other tasks."""
    min_lines: int = 6
    """Least number of lines."""
    max_lines: int = 12
    """Greatest number of lines."""
    room: int | None = None
    """Lines that the picture has room for; a shorter receipt stands anywhere in it. None: max_lines."""
    letters: int = 1
    """Letters of a code."""
    digits: int = 1
    """Digits of a price."""
    other_numbers: int = 0
    """Numbers in lighter ink between code and price, which nobody asks for."""
    width: float = 0.5
    """Width of the picture as part of its height, which is image_size."""
    ask: Literal["one", "all"] = "one"
    """What is asked for: the price of one line, or a list of all codes with their prices, in any order."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "a number above 0")
        require(1 <= self.letters <= 2, "letters", self.letters, "1 or 2")
        require(1 <= self.digits <= 3, "digits", self.digits, "1 to 3")
        require(0 <= self.other_numbers <= 3, "other_numbers", self.other_numbers, "0 to 3")
        require(0.1 <= self.width <= 1, "width", self.width, "0.1 to 1")
        most = min(len(_LETTERS) ** self.letters, 100)
        require(self.max_lines <= most, "max_lines", self.max_lines, f"at most {most}: a code for each line")
        least = f"1 to max_lines ({self.max_lines})"
        require(1 <= self.min_lines <= self.max_lines, "min_lines", self.min_lines, least)
        require(self.max_lines <= self.lines <= 100, "room", self.room, f"max_lines ({self.max_lines}) to 100")

    @property
    def lines(self) -> int:
        """Lines that the picture has room for."""
        return self.max_lines if self.room is None else self.room

    @property
    def name(self) -> str:
        return "long_receipt"

    @property
    def min_image_size(self) -> int:
        # A line is at least 9 pixels high, and a character of that size up to 8 wide.
        columns = self.letters + (self.digits + 1) * (1 + self.other_numbers)
        return int(np.ceil(max(9 * self.lines, 8 * columns / self.width)))

    @property
    def max_questions(self) -> int:
        return self.min_lines if self.ask == "one" else 1

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Lines, tuple[Question, ...]]:
        while True:
            number = int(rng.integers(self.min_lines, self.max_lines + 1))
            codes = tuple(self._code(n) for n in rng.permutation(len(_LETTERS) ** self.letters)[:number].tolist())
            prices = tuple(rng.integers(self._least, 10**self.digits, number).tolist())
            if in_split((codes, prices), split):
                break
        others = rng.integers(self._least, 10**self.digits, (number, self.other_numbers)).tolist()
        first = int(rng.integers(self.lines - number + 1))
        scene = Lines(codes, prices, tuple(map(tuple, others)), first)
        order = tuple(rng.permutation(number).tolist())
        if self.ask == "all":
            return scene, (Question("What is the price of all?", "long_receipt.all", "exact_match", target=order),)
        return scene, tuple(
            Question(f"What is the price of {codes[line]}?", "long_receipt.one", "exact_match", target=(line,))
            for line in order[:count]
        )

    @property
    def _least(self) -> int:
        return 10 ** (self.digits - 1) if self.digits > 1 else 0

    def _code(self, number: int) -> str:
        first, last = divmod(number, len(_LETTERS))
        return _LETTERS[last] if self.letters == 1 else _LETTERS[first] + _LETTERS[last]

    def answer(self, scene: Lines, question: Question) -> str:
        if self.ask == "one":
            return str(scene.prices[question.target[0]])
        return " ".join(f"{scene.codes[line]}{scene.prices[line]}" for line in question.target)

    def redeal(self, rng: np.random.Generator, split: Split, scene: Lines, question: Question) -> Lines:
        line = question.target[int(rng.integers(len(question.target)))]
        # Any price but the old one, each as likely.
        span = 10**self.digits - self._least
        new = (scene.prices[line] - self._least + int(rng.integers(1, span))) % span + self._least
        prices = (*scene.prices[:line], new, *scene.prices[line + 1 :])
        return dataclasses.replace(scene, prices=prices)

    def evidence(self, scene: Lines, question: Question, image_size: int) -> Box:
        """The line from its code to its price; the box around all lines where all are asked for."""
        step = image_size / self.lines
        left, right = self._margins(image_size)
        top, bottom = min(question.target) + scene.first, max(question.target) + scene.first + 1
        return float(left), float(round(top * step)), float(right), float(round(bottom * step))

    def paint(self, scene: Lines, image_size: int) -> UInt8[NpArray, "Y X 3"]:
        """The picture of a receipt, `image_size` pixels high."""
        picture = np.full((image_size, round(image_size * self.width), 3), palette.PAPER, np.uint8)
        step = image_size / self.lines
        # Capitals and digits of the bundled font are about 0.73 of its size high; a fifth of a line stays free.
        size = round(step * 0.8 / 0.73)
        left, right = self._margins(image_size)
        for line, (code, price, others) in enumerate(zip(scene.codes, scene.prices, scene.others, strict=True)):
            middle = (scene.first + line + 0.5) * step
            self._put(picture, code, size, middle, left, False, palette.INK)
            self._put(picture, str(price), size, middle, right, True, palette.INK)
            for column, number in enumerate(others):
                at = left + round((right - left) * (column + 1.5) / (len(others) + 1.5))
                self._put(picture, str(number), size, middle, min(at, right), True, _FAINT)
        return picture

    def _margins(self, image_size: int) -> tuple[int, int]:
        width = round(image_size * self.width)
        return width // 16, width - width // 16

    @staticmethod
    def _put(
        picture: UInt8[NpArray, "Y X 3"],
        words: str,
        size: int,
        middle: float,
        x: int,
        at_right: bool,
        colour: canvas.Colour,
    ) -> None:
        """Text whose ink has its middle at a height and begins, or ends, at x."""
        ink = canvas.text(words, size)
        ink = ink[ink.any(1)]
        canvas.stamp(picture, ink, round(middle - ink.shape[0] / 2), x - at_right * ink.shape[1], colour)
