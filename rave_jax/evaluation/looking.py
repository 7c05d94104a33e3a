"""Where answers looked: how much of their attention over the picture lies on the evidence, and the pictures of it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rave_jax.data.images import read_image
from rave_jax.data.sample import Sample
from rave_jax.look.maps import Box, Look, area, relative_box
from rave_jax.look.overlay import Caption, save_heads, save_overlay


@dataclass(frozen=True)
class Looked:
    """One answer's look at the first picture of its sample.

    Attributes:
        on_picture: share of all attention that went to the picture.
        box: evidence in fractions of the picture; None where it is not known, as is what follows.
        in_box: share of the picture's attention inside the box, over the layers asked for.
        by_layer: the same for each layer alone.
        area: share of the picture that the box covers.
    """

    task: str
    on_picture: float
    box: Box | None = None
    in_box: float = 0.0
    by_layer: tuple[float, ...] = ()
    area: float = 0.0


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
    """

    samples: int
    on_picture: float
    boxes: Boxes | None
    by_task: dict[str, Boxes]
    by_layer: tuple[float, ...]

    def sentence(self) -> str:
        """The finding in words."""
        text = f"{self.on_picture:.1%} of the answers' attention went to the picture ({self.samples} answers)"
        if self.boxes is None:
            return text
        best = int(np.argmax(self.by_layer))
        return (
            f"{text}; of that, {self.boxes.in_box:.1%} in the evidence box, whose area is {self.boxes.area:.1%} "
            f"({self.boxes.in_box / max(self.boxes.area, 1e-9):.2f} x uniform attention; "
            f"most in layer {best}, {self.by_layer[best]:.1%})"
        )


def measure(sample: Sample, look: Look, image: Image.Image, layers: tuple[int, ...]) -> Looked:
    """Numbers of one look; `layers` are averaged (all when empty)."""
    if sample.evidence is None:
        return Looked(sample.task, look.on_picture)
    box = relative_box(sample.evidence, *image.size)
    by_layer = tuple(look.in_box(box, (layer,)) for layer in range(len(look.weights)))
    return Looked(sample.task, look.on_picture, box, look.in_box(box, layers), by_layer, area(box))


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
    )


def _boxes(looks: Sequence[Looked]) -> Boxes:
    return Boxes(len(looks), float(np.mean([x.in_box for x in looks])), float(np.mean([x.area for x in looks])))


def spread(tasks: Sequence[str], count: int) -> list[int]:
    """`count` indices, taken from the tasks in turn, each task from its first sample on."""
    seen: defaultdict[str, int] = defaultdict(int)
    turns = []
    for index, task in enumerate(tasks):
        turns.append((seen[task], index))
        seen[task] += 1
    return [index for _, index in sorted(turns)[:count]]


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
    source = sample.images[0]
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
