"""Routing accuracy: how many of the regions that an answer's queries choose overlap the evidence, against chance.

Source: Gaze Attention (arXiv 2605.13080) counts routed regions that overlap the mask of a phrase, against the share
that random choices would get. Ours: the evidence is a box, and a region overlaps it if one of its visual tokens does;
the queries are those that chose the answer's tokens; all layers, query heads and queries count alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rave_jax.batch import Kind, TokenInfo
from rave_jax.data.sample import Sample
from rave_jax.evaluation.accounting import Reading, mean_reading
from rave_jax.look.maps import Box, coverage
from rave_jax.typing import Bool, Float, Int, NpArray


@dataclass(frozen=True)
class Route:
    """What the queries that chose one answer's tokens read of the sample's pictures.

    Attributes:
        chosen: share of them that chose each region, [layers that route, heads, regions]; None where nothing routes,
            or where the first visual is a video.
        cells: number of the region, from 0, that each cell of the first picture's merged grid is in.
        reading: what text queries of the prompt read, and what that costs; None without pictures.
    """

    chosen: Float[NpArray, "L H R"] | None
    cells: Int[NpArray, "y x"] | None
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


def cells_of(info: TokenInfo) -> Int[NpArray, "y x"] | None:
    """Number of the region, from 0, of each cell of the first picture; None without a picture or regions."""
    codes = {name: np.asarray(code) for name, code in info._asdict().items()}
    tokens = np.flatnonzero((codes["image"] == 1) & (codes["kind"] == Kind.VISUAL))
    if not len(tokens) or not codes["region"].any():
        return None
    cells = np.zeros((codes["grid_h"][tokens[0]], codes["grid_w"][tokens[0]]), np.int32)
    cells[codes["row"][tokens], codes["col"][tokens]] = codes["region"][tokens] - 1
    return cells


def overlapping(cells: Int[NpArray, "y x"], regions: int, box: Box) -> Bool[NpArray, "R"]:
    """Which of so many regions a box, in fractions of the picture, overlaps."""
    shape = cells.shape[0], cells.shape[1]
    # Edges that only touch cover nothing but rounding.
    touched = np.unique(cells[coverage(box, shape) > 1e-6])
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
    evidence = overlapping(route.cells, regions, box)
    shares = route.chosen[..., evidence].sum(-1) / np.maximum(route.chosen.sum(-1), 1e-30)
    return Hits(sample.task, tuple(shares.mean(axis=1).tolist()), float(evidence.mean()))


def summarise(routes: Sequence[Route], found: Sequence[Hits]) -> RoutingSummary | None:
    """Means of many samples; None of nothing."""
    if not routes:
        return None
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
