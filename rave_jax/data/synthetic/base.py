"""What every synthetic task has in common: scenes, questions, content splits, and making a Sample.

A task draws a scene (plain numbers, no pixels) from the content of one split, asks about it, and paints
it. Because the scene is kept apart from the picture, its evidence can be changed while everything else
in the picture stays: `redeal` makes that picture for the test of whether a model looks.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from rave_jax.config import require
from rave_jax.data.sample import Sample
from rave_jax.typing import NpArray, UInt8

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
Box = tuple[float, float, float, float]
Metric = Literal["exact_match", "relaxed_accuracy", "anls"]
Scene = TypeVar("Scene")
LABELS = "ABCDEFGH"
"""What several pictures of one sample are called, in their order."""
_HELDOUT_ONE_IN = 5


@dataclass(frozen=True)
class Question:
    """A question about a scene; its answer follows from the scene and `target`.

    Attributes:
        text: the words of the question.
        template: what is asked, without the particulars; the question-only floor groups by it.
        metric: how an answer is scored.
        target: what the question points at, in the task's own terms.
        picture: number of the picture that shows the answer, from 0; the first where several do.
    """

    text: str
    template: str
    metric: Metric
    target: Any
    picture: int = 0


class Task(Protocol[Scene]):
    """One kind of picture and question. A task is a frozen config; all randomness comes from `rng`."""

    @property
    def name(self) -> str:
        """Name of the task, the same for every option."""
        ...

    @property
    def weight(self) -> float:
        """Share of the task in a mixture, relative to the other tasks."""
        ...

    @property
    def min_image_size(self) -> int:
        """Smallest picture side in pixels at which everything asked is legible."""
        ...

    @property
    def max_questions(self) -> int:
        """Different questions that every picture of the task has room for."""
        ...

    def draw(self, rng: np.random.Generator, split: Split, count: int) -> tuple[Scene, tuple[Question, ...]]:
        """A scene made of the split's content, and `count` questions about different things in it."""
        ...

    def answer(self, scene: Scene, question: Question) -> str:
        """The answer, read off the scene."""
        ...

    def evidence(self, scene: Scene, question: Question, image_size: int) -> Box:
        """Pixel box (x1, y1, x2, y2; the far edges excluded) of what carries the answer, in `question.picture`."""
        ...

    def redeal(self, rng: np.random.Generator, split: Split, scene: Scene, question: Question) -> Scene:
        """The scene changed only so far that the answer to `question` is another one."""
        ...

    def paint(self, scene: Scene, image_size: int) -> UInt8[NpArray, "*N S X 3"]:
        """The picture of a scene, or N of them: `image_size` pixels high, and as wide where the task says no other."""
        ...


def in_split(content: Hashable, split: Split) -> bool:
    """Whether a piece of content belongs to a split: one in five is held out, by a hash of its `repr`.

    The hash sees nothing of seeds or positions in a data set, so equal content is always on one side.
    """
    return (zlib.crc32(repr(content).encode()) % _HELDOUT_ONE_IN == 0) == (split == "heldout")


def generator(seed: int, split: Split, index: int) -> np.random.Generator:
    """The random stream of one sample."""
    return np.random.default_rng((seed, SPLITS.index(split), index))


def make_sample(
    task: Task[Any],
    rng: np.random.Generator,
    *,
    split: Split,
    image_size: int,
    questions: int,
    sample_id: str,
    redealt: bool,
) -> Sample:
    """One sample of a task, from the random stream `rng`.

    Args:
        questions: question turns about the picture; the last one is the scored one.
        redealt: paint the scene with the evidence of the last question changed. Question and answer
            stay those of the first scene, so a model that looks is now wrong; the evidence box is the
            new scene's.

    Raises:
        ConfigError: `image_size` is too small for the task to be legible.
    """
    least = task.min_image_size
    require(image_size >= least, f"image_size (for {task.name})", image_size, f"at least {least} pixels")
    scene, asked = task.draw(rng, split, questions)
    answers = [task.answer(scene, question) for question in asked]
    last = asked[-1]
    if redealt:
        scene = task.redeal(rng, split, scene, last)
    pictures = _shown(task.paint(scene, image_size))
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        content = question.text if number else [*pictures, {"type": "text", "text": question.text}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Sample(
        id=sample_id,
        messages=tuple(messages),
        answers=(answers[-1],),
        metric=last.metric,
        source="synthetic",
        evidence=task.evidence(scene, last, image_size),
        template=last.template,
        task=task.name,
        evidence_image=last.picture,
    )


def _shown(painted: UInt8[NpArray, "*N S X 3"]) -> list[dict[str, Any]]:
    """The pictures of a sample as parts of its first message; where a task has several, each behind its letter."""
    if painted.ndim == 3:
        return [{"type": "image", "image": painted}]
    parts: list[dict[str, Any]] = []
    for label, picture in zip(LABELS, painted, strict=False):
        parts += [{"type": "text", "text": f"{label}:"}, {"type": "image", "image": picture}]
    return parts
