"""Routing accuracy: how many of the regions that an answer's queries choose overlap the evidence, against chance.

Source: Gaze Attention (arXiv 2605.13080) counts routed regions that overlap the mask of a phrase, against the share
that random choices would get. Ours: the evidence is a box, and a region overlaps it if one of its visual tokens does;
the queries are those that chose the answer's tokens; all layers, query heads and queries count alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from rave_jax.batch import Kind, TokenInfo
from rave_jax.data.images import read_image
from rave_jax.data.sample import Sample
from rave_jax.evaluation.accounting import Reading, mean_reading
from rave_jax.evaluation.markdown import table
from rave_jax.evaluation.probe import Answered, Found
from rave_jax.layout import WHOLE, Box, Shown, seen_from
from rave_jax.look.maps import coverage, relative_box
from rave_jax.typing import Bool, Float, Int, NpArray


class Cells(NamedTuple):
    """Where the regions of one grid lie.

    Fields:
        regions: number of the region, from 0, that each cell of the grid is in.
        box: the part of the picture that the grid stands for, in fractions of the picture.
    """

    regions: Int[NpArray, "y x"]
    box: Box = WHOLE


@dataclass(frozen=True)
class Route:
    """What the queries that chose one answer's tokens read of the sample's pictures.

    Attributes:
        chosen: share of them that chose each region, [layers that route, heads, regions]; None where nothing routes,
            or where the first visual is a video.
        cells: of each grid that shows the first picture, the numbers of its regions.
        reading: what text queries of the prompt read, and what that costs; None without pictures.
    """

    chosen: Float[NpArray, "L H R"] | None
    cells: tuple[Cells, ...] | None
    reading: Reading | None


@dataclass(frozen=True)
class Hits:
    """One answer's choices against its evidence: by layer, and the share of all regions that overlap it."""

    task: str
    by_layer: tuple[float, ...]
    chance: float


@dataclass(frozen=True)
class Accuracy:
    """Means over samples: of the chosen regions, and of all, how many overlap the evidence."""

    samples: int
    accuracy: float
    chance: float


@dataclass(frozen=True)
class RoutingSummary:
    """Means over many samples.

    Attributes:
        samples: whose prompts were counted.
        reading: what their text queries read; None without pictures.
        hits: over samples with known evidence, where attention is routed; None without such.
        by_task: the same for each task.
        by_layer: accuracy of each layer that routes.
    """

    samples: int
    reading: Reading | None
    hits: Accuracy | None
    by_task: dict[str, Accuracy]
    by_layer: tuple[float, ...]

    def values(self) -> dict[str, float]:
        """What is read, and how many chosen regions overlap the evidence."""
        found = {} if self.reading is None else {"entries": self.reading.entries}
        return found if self.hits is None else found | {"accuracy": self.hits.accuracy, "chance": self.hits.chance}

    def sentences(self) -> list[str]:
        """The findings in words."""
        said = [] if self.reading is None else [self.reading.sentence()]
        if self.hits is not None:
            layers = ", ".join(f"{share:.1%}" for share in self.by_layer)
            said.append(
                f"of the regions that answers chose, {self.hits.accuracy:.1%} overlap the evidence, by chance "
                f"{self.hits.chance:.1%} ({self.hits.samples} answers; by layer {layers})"
            )
        return said


def cells_of(info: TokenInfo, shown: Sequence[Shown] = (), picture: int = 1) -> tuple[Cells, ...] | None:
    """Where the regions of one picture lie; None without such a picture or regions.

    Args:
        info: token codes of one row (arrays [S]).
        shown: for each image number of `info`, from 1, what its tokens show; empty: each is a whole picture.
        picture: number of the picture in the conversation, from 1.
    """
    codes = {name: np.asarray(code) for name, code in info._asdict().items()}
    found = []
    for number, one in enumerate(shown or [Shown(n, WHOLE) for n in range(1, picture + 1)], start=1):
        tokens = np.flatnonzero((codes["image"] == number) & (codes["kind"] == Kind.VISUAL))
        if one.picture != picture or one.box is None or not len(tokens):
            continue
        cells = np.zeros((codes["grid_h"][tokens[0]], codes["grid_w"][tokens[0]]), np.int32)
        cells[codes["row"][tokens], codes["col"][tokens]] = codes["region"][tokens] - 1
        found.append(Cells(cells, one.box))
    return tuple(found) if found and codes["region"].any() else None


def overlapping(cells: Cells, regions: int, box: Box) -> Bool[NpArray, "R"]:
    """Which of so many regions a box, in fractions of the picture, overlaps."""
    shape = cells.regions.shape[0], cells.regions.shape[1]
    # Edges that only touch cover nothing but rounding.
    touched = np.unique(cells.regions[coverage(seen_from(cells.box, box), shape) > 1e-6])
    return np.isin(np.arange(regions), touched)


def hits(sample: Sample, route: Route, box: Box) -> Hits | None:
    """One answer's choices against its evidence; None where nothing routes.

    Args:
        sample: names the task.
        route: what was chosen.
        box: the evidence in fractions of the picture.
    """
    if route.chosen is None or route.cells is None:
        return None
    regions = route.chosen.shape[-1]
    evidence = np.any([overlapping(cells, regions, box) for cells in route.cells], axis=0)
    shares = route.chosen[..., evidence].sum(-1) / np.maximum(route.chosen.sum(-1), 1e-30)
    return Hits(sample.task, tuple(shares.mean(axis=1).tolist()), float(evidence.mean()))


def against_evidence(sample: Sample, route: Route) -> Hits | None:
    """One answer's choices against the evidence of its sample; None where none is known or nothing routes."""
    if sample.evidence is None or route.chosen is None:
        return None
    box = relative_box(sample.evidence, *read_image(sample.evidence_picture, sample.called).size)
    return hits(sample, route, box)


def summary_of(samples: Sequence[Sample], routes: Sequence[Route | None]) -> RoutingSummary | None:
    """What a subject's routes say of its samples; None of nothing."""
    pairs = [(sample, route) for sample, route in zip(samples, routes, strict=True) if route is not None]
    return summarise([route for _, route in pairs], [against_evidence(sample, route) for sample, route in pairs])


def summarise(routes: Sequence[Route], counted: Sequence[Hits | None]) -> RoutingSummary | None:
    """Means of many samples; None of nothing."""
    if not routes:
        return None
    found = [one for one in counted if one is not None]
    by_task: defaultdict[str, list[Hits]] = defaultdict(list)
    for one in found:
        by_task[one.task].append(one)
    return RoutingSummary(
        samples=len(routes),
        reading=mean_reading([route.reading for route in routes if route.reading is not None]),
        hits=_accuracy(found) if found else None,
        by_task={task: _accuracy(group) for task, group in sorted(by_task.items())},
        by_layer=tuple(np.mean([one.by_layer for one in found], axis=0).tolist()) if found else (),
    )


def _accuracy(found: Sequence[Hits]) -> Accuracy:
    return Accuracy(
        len(found), float(np.mean([one.by_layer for one in found])), float(np.mean([one.chance for one in found]))
    )


@dataclass(frozen=True)
class Routes:
    """Counts what so many prompts and answers read of their pictures, and their choices against known evidence."""

    samples: int
    name: ClassVar[str] = "routing"

    def measure(self, answered: Answered) -> Found:
        """Count them."""
        routes: list[Route] = []
        found: list[Hits | None] = []
        for block in answered.blocks(self.samples):
            for sample, route in zip(block.samples, answered.subject.route(block.samples, block.answers), strict=True):
                if route is None:
                    continue
                routes.append(route)
                found.append(against_evidence(sample, route))
        return Found(summarise(routes, found))

    @staticmethod
    def section(finding: Mapping[str, Any]) -> list[str]:
        """Lines of the report; none where no picture was read."""
        if finding["reading"] is None:
            return []
        r = finding["reading"]
        costs = [f"{r[name] / 1e6:,.3g}" for name in ("attention", "routing", "context")]
        rows = [
            ["this model", *costs, f"{r['bytes'] / 1e3:,.4g}"],
            ["plain attention", f"{r['dense_attention'] / 1e6:,.3g}", "0", "0", f"{r['dense_bytes'] / 1e3:,.4g}"],
        ]
        page = [
            "### What queries read of the pictures",
            "",
            f"A text query reads {r['entries']:,.1f} entries of {r['visual']:,.1f} visual tokens in a layer, at most "
            f"{r['most']:,} ({finding['samples']:,} prompts). In all layers:",
            "",
            *table(["", "attention, MFLOPs", "routing", "context tokens", "kB"], rows, left=1),
            "",
        ]
        if finding["hits"] is None:
            return page
        rows = [
            [task, f"{h['samples']:,}", f"{h['accuracy']:.1%}", f"{h['chance']:.1%}"]
            for task, h in [*finding["by_task"].items(), ("all", finding["hits"])]
        ]
        layers = ", ".join(f"{share:.1%}" for share in finding["by_layer"])
        page += table(["task", "answers", "chosen regions on the evidence", "by chance"], rows, left=1)
        return [*page, "", f"By layer that routes, from the first: {layers}.", ""]
