"""Shop receipts of at least 44 printed words in four sizes, asked for the total, a price, a quantity or the shop.

The words of a receipt, its prices and its total belong to one split. The words that every receipt has
(Total, Tax, Cash and so on) are the same in both: they say what to read, and are never the answer.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rave_jax.config import require
from rave_jax.data.synthetic import canvas, palette
from rave_jax.data.synthetic.base import Box, Question, Split, in_split
from rave_jax.data.synthetic.words import WORDS
from rave_jax.typing import NpArray, UInt8

Asked = Literal["total", "price", "quantity", "shop"]


@dataclass(frozen=True)
class Line:
    """A line of the receipt: a number bought, its name, and what that came to in cents."""

    quantity: int
    item: str
    cents: int


@dataclass(frozen=True)
class Bill:
    """What a receipt says, and how it is set.

    Attributes:
        tax_percent: added to the sum of the lines.
        notes: what was paid in cash, in cents.
        quantity_first: the columns are quantity, item, price; otherwise item, quantity, price.
        centred: the head is centred; otherwise it stands at the left.
    """

    shop: str
    street: str
    moment: str
    lines: tuple[Line, ...]
    tax_percent: int
    notes: int
    farewell: str
    quantity_first: bool
    centred: bool

    @property
    def subtotal(self) -> int:
        """Sum of the lines in cents."""
        return sum(line.cents for line in self.lines)

    @property
    def tax(self) -> int:
        """Tax in cents."""
        return round(self.subtotal * self.tax_percent / 100)

    @property
    def total(self) -> int:
        """What is to be paid, in cents."""
        return self.subtotal + self.tax


@dataclass(frozen=True)
class _Text:
    """A piece of text in the picture; `role` names what a question may point at."""

    words: str
    size: int
    bold: bool
    top: int
    left: int
    role: tuple[str, int] | None


@dataclass(frozen=True)
class Receipt:
    """Receipts with two-word items. Every answer is a short text, scored by ANLS."""

    weight: float = 1.0
    """Share of this task in the mixture, relative to the other tasks."""
    min_lines: int = 5
    """Least number of different items bought."""
    max_lines: int = 7
    """Greatest number of different items bought."""
    ask: tuple[Asked, ...] = ("total", "price", "quantity", "shop")
    """What is asked for."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "a number above 0")
        most = self.max_lines
        require(5 <= self.min_lines <= most, "min_lines", self.min_lines, f"5 to max_lines ({most})")
        require(self.max_lines <= 10, "max_lines", self.max_lines, "at most 10")
        some = 'at least one of "total", "price", "quantity" and "shop", each once'
        require(0 < len(set(self.ask)) == len(self.ask), "ask", self.ask, some)

    @property
    def name(self) -> str:
        return "receipt"

    @property
    def min_image_size(self) -> int:
        return 14 * (self.max_lines + 9)

    @property
    def max_questions(self) -> int:
        return len(self.ask)

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Bill, tuple[Question, ...]]:
        words = WORDS[split]
        number = int(rng.integers(self.min_lines, self.max_lines + 1))
        goods = rng.permutation(len(words.goods))[:number].tolist()
        items = [f"{_one(rng, words.qualities)} {words.goods[good]}" for good in goods]
        lines = tuple(Line(int(rng.integers(1, 10)), item.capitalize(), 0) for item in items)
        bill = Bill(
            shop=f"{_one(rng, words.places)} {_one(rng, words.trades)}",
            street=f"{rng.integers(1, 100)} {_one(rng, words.streets)} {_one(rng, words.ways)}",
            moment=f"{rng.integers(1, 29):02}/{rng.integers(1, 13):02}/20{rng.integers(10, 40)} "
            f"{rng.integers(8, 21):02}:{rng.integers(60):02}",
            lines=lines,
            tax_percent=int(rng.integers(4, 13)),
            notes=0,
            farewell=_one(rng, words.farewells),
            quantity_first=bool(rng.integers(2)),
            centred=bool(rng.integers(2)),
        )
        bill = _priced(rng, split, bill)
        targets = [(role, int(rng.integers(number)) if role in ("price", "quantity") else 0) for role in self.ask]
        chosen = [targets[i] for i in rng.permutation(len(targets))[:count]]
        return bill, tuple(self._question(bill, role, line) for role, line in chosen)

    def _question(self, bill: Bill, role: str, line: int) -> Question:
        item = bill.lines[line].item.lower()
        text = {
            "total": "What is the total?",
            "price": f"What is the price of {item}?",
            "quantity": f"What is the quantity of {item}?",
            "shop": "What is the name of the shop?",
        }[role]
        return Question(text, template=f"receipt.{role}", metric="anls", target=(role, line))

    def answer(self, scene: Bill, question: Question) -> str:
        role, line = question.target
        match role:
            case "total":
                return _money(scene.total)
            case "price":
                return _money(scene.lines[line].cents)
            case "quantity":
                return str(scene.lines[line].quantity)
            case _:
                return scene.shop

    def redeal(self, rng: np.random.Generator, split: Split, scene: Bill, question: Question) -> Bill:
        """Another shop, quantity, or price (all prices, for the total), with nothing of the old answer left.

        ANLS forgives an answer that is half right, so the new number shares no digit with the old one.
        """
        role, line = question.target
        words = WORDS[split]
        old = self.answer(scene, question)
        while True:
            if role == "shop":
                scene = dataclasses.replace(scene, shop=f"{_one(rng, words.places)} {_one(rng, words.trades)}")
                if not set(scene.shop.split()) & set(old.split()):
                    return scene
                continue
            if role == "total":
                scene = _priced(rng, split, scene)
            else:
                lines = list(scene.lines)
                if role == "price":
                    lines[line] = dataclasses.replace(lines[line], cents=_one(rng, _prices(split)))
                else:
                    lines[line] = dataclasses.replace(lines[line], quantity=int(rng.integers(1, 10)))
                scene = dataclasses.replace(scene, lines=tuple(lines))
                if scene.notes < scene.total:
                    scene = _paid(rng, scene)
            if not (set(self.answer(scene, question)) & set(old)) - {"."}:
                return scene

    def evidence(self, scene: Bill, question: Question, image_size: int) -> Box:
        """The box of the printed answer."""
        for text in self._set(scene, image_size):
            if text.role == question.target:
                mask = canvas.text(text.words, text.size, text.bold)
                rows = np.flatnonzero(mask.any(1))
                top, bottom = text.top + int(rows[0]), text.top + int(rows[-1]) + 1
                return float(text.left), float(top), float(text.left + mask.shape[1]), float(bottom)
        raise AssertionError(f"nothing on the receipt answers {question.text!r}")

    def paint(self, scene: Bill, image_size: int) -> UInt8[NpArray, "S S 3"]:
        picture = canvas.blank(image_size, palette.PAPER)
        texts = self._set(scene, image_size)
        for text in texts:
            canvas.stamp(picture, canvas.text(text.words, text.size, text.bold), text.top, text.left, palette.INK)
        margin = image_size // 16
        for words in ("Item", "Subtotal"):
            row = next(text.top for text in texts if text.words == words) - 1
            picture[row, margin : image_size - margin] = 130
        return picture

    def words(self, scene: Bill) -> list[str]:
        """All printed words, in reading order."""
        return [word for text in self._set(scene, 2 * self.min_image_size) for word in text.words.split()]

    def _set(self, scene: Bill, image_size: int) -> list[_Text]:
        """The texts in their places."""
        step = image_size / (len(scene.lines) + 11.3)
        # The bundled font takes 1.2 times its size from line to line.
        body, small, large, title = (round(step * part) for part in (0.8, 0.72, 0.95, 1.2))
        margin = image_size // 16
        right = image_size - margin
        texts: list[_Text] = []
        top = step * 0.3

        def put(words: str, at: Literal["left", "right", "middle"], x: int, size: int, role=None, bold=False) -> None:
            width = canvas.text(words, size, bold).shape[1]
            left = {"left": x, "right": x - width, "middle": x - width // 2}[at]
            texts.append(_Text(words, size, bold, round(top), left, role))

        def head(words: str, size: int, role=None, bold=False) -> None:
            if scene.centred:
                put(words, "middle", image_size // 2, size, role, bold)
            else:
                put(words, "left", margin, size, role, bold)

        head(scene.shop, title, ("shop", 0), bold=True)
        top += step * 1.45
        head(scene.street, small)
        top += step * 0.9
        head(scene.moment, small)
        top += step * 1.15
        item_x = margin + round(2.4 * body) if scene.quantity_first else margin
        quantity_x = margin + round(1.7 * body) if scene.quantity_first else right - round(3.6 * body)
        put("Item", "left", item_x, small)
        put("Qty", "right", quantity_x, small)
        put("Price", "right", right, small)
        for number, line in enumerate(scene.lines):
            top += step
            put(str(line.quantity), "right", quantity_x, body, ("quantity", number))
            put(line.item, "left", item_x, body)
            put(_money(line.cents), "right", right, body, ("price", number))
        top += step * 0.15
        sums = (("Subtotal", scene.subtotal), ("Tax", scene.tax), ("Total", scene.total), ("Cash", scene.notes))
        for name, cents in (*sums, ("Change", scene.notes - scene.total)):
            whole = name == "Total"
            size, role = (large, ("total", 0)) if whole else (small, None)
            top += step * (1.0 if whole or name == "Subtotal" else 0.88)
            put(name, "left", margin, size, bold=whole)
            put(_money(cents), "right", right, size, role, bold=whole)
            top += step * 0.25 * whole
        top += step * 1.05
        head(scene.farewell, small)
        return texts


def _one[T](rng: np.random.Generator, options: tuple[T, ...]) -> T:
    return options[int(rng.integers(len(options)))]


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


@functools.cache
def _prices(split: Split) -> tuple[int, ...]:
    """The prices of a split, in cents."""
    return tuple(cents for cents in range(100, 1000) if in_split(_money(cents), split))


def _priced(rng: np.random.Generator, split: Split, bill: Bill) -> Bill:
    """The bill with new prices, all different; they and the total belong to the split."""
    known = _prices(split)
    while True:
        cents = [known[i] for i in rng.permutation(len(known))[: len(bill.lines)]]
        lines = tuple(dataclasses.replace(line, cents=c) for line, c in zip(bill.lines, cents, strict=True))
        bill = dataclasses.replace(bill, lines=lines)
        if in_split(_money(bill.total), split):
            return _paid(rng, bill)


def _paid(rng: np.random.Generator, bill: Bill) -> Bill:
    """The bill paid with enough notes of five."""
    notes = (bill.total // 500 + int(rng.integers(1, 5))) * 500
    return dataclasses.replace(bill, notes=notes)
