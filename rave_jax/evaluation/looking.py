"""Where answers looked: how much of their attention over the picture lies on the evidence, and the pictures of it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from rave_jax.data.images import read_image
from rave_jax.data.sample import Sample
from rave_jax.evaluation.markdown import table
from rave_jax.evaluation.probe import Answered, Found
from rave_jax.look.maps import Box, Look, area, relative_box
from rave_jax.look.overlay import Caption, save_heads, save_overlay


@dataclass(frozen=True)
class Looked:
    """One answer's look at the picture of its sample that holds the evidence (the first where nobody knows).

    Attributes:
        on_picture: share of all attention that went to the picture.
        box: evidence in fractions of the picture; None where it is not known, as is what follows.
        in_box: share of the picture's attention inside the box, over the layers asked for.
        by_layer: the same for each layer alone; 0 for one that does not attend.
        area: share of the picture that the box covers.
        question_in_box: share of the question's attention to the picture inside the box; None where it was not read.
    """

    task: str
    on_picture: float
    box: Box | None = None
    in_box: float = 0.0
    by_layer: tuple[float, ...] = ()
    area: float = 0.0
    question_in_box: float | None = None


@dataclass(frozen=True)
class Boxes:
    """Means over samples with known evidence. Attention spread evenly gives `in_box` equal to `area`."""

    samples: int
    in_box: float
    area: float


@dataclass(frozen=True)
class Looking:
    """Means over many looks.

    Attributes:
        samples: how many were measured.
        on_picture: share of all attention that went to the picture.
        boxes: over the samples with known evidence; None without such.
        by_task: the same for each task.
        by_layer: share inside the box for each layer alone.
        question: over the samples whose question's attention was read, of that attention; None without such.
    """

    samples: int
    on_picture: float
    boxes: Boxes | None
    by_task: dict[str, Boxes]
    by_layer: tuple[float, ...]
    question: Boxes | None = None

    def values(self) -> dict[str, float]:
        """The shares of attention."""
        found = {"on_picture": self.on_picture}
        if self.boxes is not None:
            found |= {"in_box": self.boxes.in_box, "area": self.boxes.area}
        return found if self.question is None else found | {"question_in_box": self.question.in_box}

    def sentences(self) -> list[str]:
        """The finding in words."""
        text = f"{self.on_picture:.1%} of the answers' attention went to the picture ({self.samples} answers)"
        if self.boxes is None:
            return [text]
        best = int(np.argmax(self.by_layer))
        said = [
            f"{text}; of that, {self.boxes.in_box:.1%} in the evidence box, whose area is {self.boxes.area:.1%} "
            f"({self.boxes.in_box / max(self.boxes.area, 1e-9):.2f} x uniform attention; "
            f"most in layer {best}, {self.by_layer[best]:.1%})"
        ]
        if self.question is not None:
            said.append(f"of the questions' attention to the picture, {_against_area(self.question)}")
        return said


def _against_area(boxes: Boxes) -> str:
    times = boxes.in_box / max(boxes.area, 1e-9)
    return f"{boxes.in_box:.1%} is in the evidence box ({times:.2f} x uniform attention)"


def measure(sample: Sample, look: Look, image: Image.Image, layers: tuple[int, ...]) -> Looked:
    """Numbers of one look; `layers` are averaged (all when empty)."""
    if sample.evidence is None:
        return Looked(sample.task, look.on_picture)
    box = relative_box(sample.evidence, *image.size)
    numbers = look.layers or tuple(range(len(look.weights)))
    by_layer = tuple(look.in_box(box, (n,)) if n in numbers else 0.0 for n in range(numbers[-1] + 1))
    asking = look.of_question
    question = None if asking is None else asking.in_box(box, layers)
    return Looked(sample.task, look.on_picture, box, look.in_box(box, layers), by_layer, area(box), question)


def summarise(looks: Sequence[Looked]) -> Looking | None:
    """Means of many looks; None of nothing."""
    if not looks:
        return None
    known = [look for look in looks if look.box is not None]
    by_task: defaultdict[str, list[Looked]] = defaultdict(list)
    for look in known:
        by_task[look.task].append(look)
    return Looking(
        samples=len(looks),
        on_picture=float(np.mean([look.on_picture for look in looks])),
        boxes=_boxes(known) if known else None,
        by_task={task: _boxes(group) for task, group in sorted(by_task.items())},
        by_layer=tuple(np.mean([look.by_layer for look in known], axis=0).tolist()) if known else (),
        question=_boxes_of_questions(known),
    )


def _boxes_of_questions(looks: Sequence[Looked]) -> Boxes | None:
    found = [(look.question_in_box, look.area) for look in looks if look.question_in_box is not None]
    return Boxes(len(found), *np.mean(found, axis=0).tolist()) if found else None


def _boxes(looks: Sequence[Looked]) -> Boxes:
    return Boxes(len(looks), float(np.mean([x.in_box for x in looks])), float(np.mean([x.area for x in looks])))


@dataclass(frozen=True)
class Drawing:
    """How looks are drawn.

    Attributes:
        layers: averaged in the maps; all when empty.
        per_head: is every head drawn by itself too?
        suffix: of the files, `png`, `pdf` or `svg`.
    """

    layers: tuple[int, ...] = ()
    per_head: bool = False
    suffix: str = "png"


@dataclass(frozen=True)
class Drawn:
    """Files of a drawn sample, relative to the folder: the maps, and the picture itself if it was no file."""

    maps: tuple[str, ...]
    image: str | None


def draw(
    out: Path, number: int, sample: Sample, look: Look, looked: Looked, how: Drawing, prediction: str, score: float
) -> Drawn:
    """Write the maps of one sample, their numbers beside them (.npz), and its picture where the source gave pixels.

    The arrays: `weights` [L,H,y,x], the attention of the answer to each cell of the picture's grid in every layer and
    head, summing to the share that went to the picture; `times_even` [y,x] and `times_even_by_head` [H,y,x], the maps
    that are drawn; `box`, the evidence in fractions of the picture, empty where it is not known.

    Args:
        out: the evaluation's folder.
        number: of the picture, the start of its name.
    """
    name = f"{number:03d}_{''.join(c if c.isalnum() or c in '-_.' else '_' for c in sample.id)[:80]}"
    source = sample.evidence_picture
    image = read_image(source, sample.called)
    note = f"{looked.on_picture:.0%} of the attention is on the picture"
    if looked.box is not None:
        note += f"; {looked.in_box:.0%} of that in the evidence box (area {looked.area:.0%})"
    maps = [f"pictures/{name}.{how.suffix}"]
    caption = Caption(sample.question, sample.answers[0], prediction, score, note)
    times_even, by_head = look.times_even(how.layers), look.times_even_by_head(how.layers)
    save_overlay(out / maps[0], image, times_even, looked.box, caption)
    if how.per_head:
        maps.append(f"pictures/{name}_heads.{how.suffix}")
        save_heads(out / maps[1], image, by_head, look.on_picture_by_head(how.layers), looked.box)
    box = np.asarray(() if looked.box is None else looked.box, np.float64)
    np.savez_compressed(
        out / "pictures" / f"{name}.npz",
        weights=look.weights,
        times_even=times_even,
        times_even_by_head=by_head,
        box=box,
    )
    if isinstance(source, (str, os.PathLike)):
        return Drawn(tuple(maps), None)
    file = f"images/{name}.png"
    (out / "images").mkdir(parents=True, exist_ok=True)
    image.save(out / file)
    return Drawn(tuple(maps), file)


@dataclass(frozen=True)
class Looks:
    """Measures where so many answers looked, and draws the first of them."""

    samples: int
    pictures: int
    drawing: Drawing
    name: ClassVar[str] = "looking"

    def measure(self, answered: Answered) -> Found:
        """Measure and draw; the records of drawn samples get the files of their pictures."""
        looks: list[Looked] = []
        pictures: list[str] = []
        drawn_so_far = 0
        for block in answered.blocks(self.samples):
            found = answered.subject.look(block.samples, block.answers)
            for record, sample, look in zip(block.records, block.samples, found, strict=True):
                if look is None:
                    continue
                looked = measure(sample, look, read_image(sample.evidence_picture, sample.called), self.drawing.layers)
                looks.append(looked)
                if drawn_so_far < self.pictures:
                    answered.check()
                    if answered.out is not None:
                        how, said = self.drawing, (record.prediction, record.score)
                        drawn = draw(answered.out, drawn_so_far, sample, look, looked, how, *said)
                        pictures += drawn.maps
                        record.image = drawn.image or record.image
                    drawn_so_far += 1
        return Found(summarise(looks), tuple(pictures))

    @staticmethod
    def section(finding: Mapping[str, Any]) -> list[str]:
        """Lines of the report."""
        page = [
            "### Where the answers look",
            "",
            f"{finding['on_picture']:.1%} of the answers' attention went to the picture ({finding['samples']:,} "
            "answers, averaged over heads and layers).",
            "",
        ]
        if finding["boxes"] is None:
            return page
        rows = [
            [
                task,
                f"{b['samples']:,}",
                f"{b['in_box']:.1%}",
                f"{b['area']:.1%}",
                f"{b['in_box'] / max(b['area'], 1e-9):.2f}",
            ]
            for task, b in [*finding["by_task"].items(), ("all", finding["boxes"])]
        ]
        layers = ", ".join(f"{share:.1%}" for share in finding["by_layer"])
        page += table(
            ["task", "answers", "attention in the evidence box", "area of the box", "x uniform"], rows, left=1
        )
        page += ["", f"Share in the box by layer, from the first: {layers}.", ""]
        # Summaries of older versions have nothing of questions.
        if finding.get("question"):
            page += [f"Of the attention of the questions' own text, {_against_area(Boxes(**finding['question']))}.", ""]
        return page
