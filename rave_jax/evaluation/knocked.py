"""Where answers come from: how far each falls when a part of the picture is hidden from all text, against the evidence.

Attention says where a token looked, and not whether what it took changed the answer. A knock-out says that: a block of
visual tokens is hidden (`look/knockout.py`), and the answer's log-probability falls by so many nats. The share of all
falls that lies in the evidence box is compared with the box's share of the picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from rave_jax.data.images import read_image
from rave_jax.data.sample import Sample
from rave_jax.evaluation.markdown import table
from rave_jax.evaluation.probe import Answered, Found
from rave_jax.look.blocks import KnockOut
from rave_jax.look.maps import area, relative_box
from rave_jax.look.overlay import Caption, save_overlay

if TYPE_CHECKING:
    from rave_jax.evaluation.records import Record


class Fall(NamedTuple):
    """Of one answer: nats that it falls by in all blocks together, and inside the box; the box's share of the picture;
    and nats that it falls by without the whole picture."""

    task: str
    all: float
    in_box: float
    area: float
    whole: float


@dataclass(frozen=True)
class Falls:
    """Falls of many answers together.

    Attributes:
        samples: how many answers.
        in_box: share of all falls that lies in the evidence boxes; 0 where nothing falls.
        area: share of the picture that the boxes cover, weighted by how far each answer falls: `in_box` of falls that
            are spread evenly.
        whole: mean fall without the whole picture, in nats.
    """

    samples: int
    in_box: float
    area: float
    whole: float

    @property
    def times_even(self) -> float:
        """`in_box` as a multiple of `area`."""
        return self.in_box / max(self.area, 1e-9)


@dataclass(frozen=True)
class KnockOuts:
    """Falls over all samples with known evidence, and over those of each task."""

    falls: Falls
    by_task: dict[str, Falls]

    def values(self) -> dict[str, float]:
        """Its main numbers by name."""
        return {"in_box": self.falls.in_box, "area": self.falls.area, "whole": self.falls.whole}

    def sentences(self) -> list[str]:
        """The finding in words."""
        f = self.falls
        return [
            f"an answer is {f.whole:.2f} nats less likely when the picture is hidden from all text ({f.samples:,} "
            f"answers); of what hiding a part of it costs, {f.in_box:.1%} is in the evidence box, whose area is "
            f"{f.area:.1%} ({f.times_even:.2f} x uniform)"
        ]


def measure(sample: Sample, found: KnockOut, width: int, height: int) -> Fall:
    """The numbers of one answer with known evidence, on a picture of this size."""
    assert sample.evidence is not None
    box = relative_box(sample.evidence, width, height)
    return Fall(sample.task, float(found.loss.sum()), found.in_box(box), area(box), found.whole)


def draw(path: Path, sample: Sample, found: KnockOut, image: Image.Image, record: Record) -> None:
    """Write the map of one answer, and its numbers beside it (.npz): the fields of `KnockOut`, and `box`, the evidence
    in fractions of the picture."""
    assert sample.evidence is not None
    box = relative_box(sample.evidence, *image.size)
    note = (
        f"without the whole picture the answer is {found.whole:.2f} nats less likely, without the part that costs most "
        f"{found.falls.max():.2f}"
    )
    caption = Caption(sample.question, sample.answers[0], record.prediction, record.score, note)
    save_overlay(path, image, found.times_even(), box, caption, "what hiding a part costs")
    np.savez_compressed(path.with_suffix(".npz"), **found._asdict(), box=np.asarray(box))


def summarise(falls: Sequence[Fall]) -> KnockOuts | None:
    """All of them together; None of nothing."""
    if not falls:
        return None
    by_task: defaultdict[str, list[Fall]] = defaultdict(list)
    for fall in falls:
        by_task[fall.task].append(fall)
    return KnockOuts(_falls(falls), {task: _falls(group) for task, group in sorted(by_task.items())})


def _falls(falls: Sequence[Fall]) -> Falls:
    every = np.array([fall.all for fall in falls])
    total = max(float(every.sum()), 1e-30)
    inside = sum(fall.in_box for fall in falls) / total
    # Where nothing falls, no answer weighs more than another.
    weights = every / total if every.any() else np.full(len(falls), 1 / len(falls))
    areas = float(weights @ np.array([fall.area for fall in falls]))
    return Falls(len(falls), inside, areas, float(np.mean([fall.whole for fall in falls])))


@dataclass(frozen=True)
class Knocks:
    """Knocks out parts of the pictures of so many answers with known evidence, and draws the first of them.

    Attributes:
        samples: answers; each costs a forward pass for each block, and two more.
        blocks: parts of a picture at most.
        pictures: how many are drawn.
        suffix: of the drawn files.
    """

    samples: int
    blocks: int
    pictures: int
    suffix: str
    name: ClassVar[str] = "knock_out"

    def measure(self, answered: Answered) -> Found:
        """Nothing where no sample is asked for, or where the evidence is known of none."""
        falls: list[Fall] = []
        pictures: list[str] = []
        for block in answered.blocks(self.samples):
            known = [i for i, sample in enumerate(block.samples) if sample.evidence is not None]
            samples, answers = [block.samples[i] for i in known], [block.answers[i] for i in known]
            found = answered.subject.knock_out(samples, answers, self.blocks) if known else []
            for i, sample, one in zip(known, samples, found, strict=True):
                if one is None:
                    continue
                image = read_image(sample.evidence_picture, sample.called)
                falls.append(measure(sample, one, *image.size))
                if len(falls) <= self.pictures and answered.out is not None:
                    answered.check()
                    name = f"pictures/{len(falls) - 1:03d}_knock_out.{self.suffix}"
                    draw(answered.out / name, sample, one, image, block.records[i])
                    pictures.append(name)
        return Found(summarise(falls), tuple(pictures))

    @staticmethod
    def section(finding: Mapping[str, Any]) -> list[str]:
        """Lines of the report."""
        by_task = {task: Falls(**fields) for task, fields in finding["by_task"].items()}
        total = Falls(**finding["falls"])
        rows = [
            [task, f"{f.samples:,}", f"{f.whole:.2f}", f"{f.in_box:.1%}", f"{f.area:.1%}", f"{f.times_even:.2f}"]
            for task, f in [*by_task.items(), ("all", total)]
        ]
        head = [
            "task",
            "answers",
            "nats without the picture",
            "cost in the evidence box",
            "area of the box",
            "x uniform",
        ]
        return [
            "### Where the answers come from",
            "",
            "Each part of the picture is hidden from all text in turn, in every layer, and costs the answer some nats "
            "of its log-probability. A cost that is spread evenly has the box's share of the picture.",
            "",
            *table(head, rows, left=1),
            "",
        ]
