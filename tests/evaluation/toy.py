"""A world small enough to know everything about: a picture's brightness is the digit asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rave_jax.data.images import read_image
from rave_jax.data.sample import ImageError, OverBudget, Sample, SampleError
from rave_jax.evaluation.routing import Cells, Route
from rave_jax.evaluation.subject import Answer, Glances, Reading
from rave_jax.evaluation.vas import VasSums
from rave_jax.look.blocks import KnockOut
from rave_jax.look.maps import Look


@dataclass(frozen=True)
class Toy:
    """Samples of the world. In "odd" questions half the answers are 3, in "even" ones they are always even."""

    split: str = "heldout"
    length: int = 200
    broken_every: int = 0
    name = "toy"

    def build(self) -> Toy:
        return self

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return self._make(index, shift=0)

    def redeal(self, index: int) -> Sample:
        return self._make(index, shift=1 + index % 9)

    def _make(self, index: int, shift: int) -> Sample:
        if self.broken_every and index % self.broken_every == 0:
            raise ImageError(f"toy{index}.png: cut off")
        rng = np.random.default_rng((self.split == "train", index))
        odd = index % 2 == 1
        digit = int(rng.choice([3, rng.integers(10)]) if odd else 2 * rng.integers(5))
        picture = np.full((6, 8, 3), 25 * ((digit + shift) % 10), np.uint8)
        content = [
            {"type": "image", "image": picture},
            {"type": "text", "text": "How bright, odd?" if odd else "How bright?"},
        ]
        return Sample(
            id=f"toy/{self.split}/{index}",
            messages=({"role": "user", "content": content}, {"role": "assistant", "content": str(digit)}),
            answers=(str(digit),),
            evidence=(0.0, 0.0, 4.0, 6.0),
            template="odd" if odd else "even",
            task="odd" if odd else "even",
            source="toy",
        )


def read(sample: Sample) -> str:
    """The digit that a picture shows."""
    return str(round(float(np.asarray(read_image(sample.images[0])).mean()) / 25))


class Fake:
    """A subject that answers by a rule, and whose answers look left (3 parts of 4) or nowhere in particular.

    Each "odd" question has `rows` rows with a VAS of 3, each "even" one as many with a VAS of 1.
    """

    def __init__(
        self,
        rule: Callable[[Sample], str],
        left: float = 0.5,
        most_pixels: Callable[[Sample], bool] | None = None,
        rows: int = 4,
    ):
        self._rule, self._left, self._too_large, self._rows = rule, left, most_pixels, rows
        self.looked_at: list[str] = []
        self.read: list[str] = []
        self.asked: set[str] = set()

    def answer(self, samples: Sequence[Sample]) -> list[Answer | SampleError]:
        self._note(samples)
        return [self._answer(sample) for sample in samples]

    def _note(self, samples: Sequence[Sample]) -> None:
        self.asked |= {sample.question for sample in samples}

    def _answer(self, sample: Sample) -> Answer | SampleError:
        if self._too_large is not None and self._too_large(sample):
            return OverBudget(f"{sample.id}: too many tokens")
        return Answer(self._rule(sample), (1,))

    def look(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Look | None]:
        assert len(samples) == len(answers)
        self._note(samples)
        self.looked_at += [sample.id for sample in samples]
        grid = np.zeros((2, 3, 2, 2), np.float32)
        grid[..., 0], grid[..., 1] = 0.2 * self._left, 0.2 * (1 - self._left)
        return [Look(grid, question=grid[..., ::-1] / 2) for _ in samples]

    def knock_out(self, samples: Sequence[Sample], answers: Sequence[Answer], most: int) -> list[KnockOut | None]:
        """Of four blocks the left ones are worth 3 nats and the right ones 1."""
        assert len(samples) == len(answers) and most >= 4
        self._note(samples)
        return [KnockOut(np.array([[2.0, 1.0], [1.0, -0.5]]), 3.5, -0.1) for _ in samples]

    def vas(self, samples: Sequence[Sample]) -> VasSums:
        self._note(samples)
        self.read += [sample.id for sample in samples]
        each = [3.0 if sample.task == "odd" else 1.0 for sample in samples]
        return VasSums(self._rows * sum(each), self._rows * len(each))

    def route(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Route | None]:
        """Two heads of two layers: one chooses the left half of the picture, the other both halves."""
        assert len(samples) == len(answers)
        self._note(samples)
        chosen = np.array([[1.0, 0.0], [1.0, 1.0]] * 2, np.float32).reshape(2, 2, 2)
        cells = np.array([[0, 1], [0, 1]], np.int32)
        return [Route(chosen, (Cells(cells),), None) for _ in samples]

    def per_sample(self, reading: Reading, samples: Sequence[Sample], answers: Sequence[Answer]) -> None:
        """There is no model to read."""
        self._note(samples)

    def glances(
        self, samples: Sequence[Sample], answers: Sequence[Answer], layers: tuple[int, ...]
    ) -> list[Glances | SampleError | None]:
        """Each token was chosen by the upper left quarter of the picture."""
        self._note(samples)
        found = [np.zeros((len(layers), len(answer.tokens) + 1, 2, 2), np.float32) for answer in answers]
        for one in found:
            one[..., 0, 0] = 1
        return [*found]


def any_source(source: Toy) -> Any:
    """The world where a config wants one of the library's own sources."""
    return source
