"""How far back answers attend (WAAD), and how much later tokens attend to each of theirs (FAI).

Source: arXiv 2510.13554, from the paper and two re-implementations. With P the attention that a layer applies, t and s
offsets, R the tokens of the answer and N the last of them:

    d(l, h) = mean over t in R of sum_s P_ts (t - s)
    local heads: the 30 % of all (l, h) with the smallest d; global heads: the 30 % with the largest
    WAAD_t = sum_s A_ts min(t - s, 10)                                  A: mean map of the local heads
    FAI_s  = mean of A_ts over t in R with s + 10 <= t <= min(N, s + 50)      A: mean map of the global heads

in five layers, evenly spaced over the middle third of those that attend. Heads are chosen for each answer. An answer of
ten tokens or fewer has no FAI. All sums are `attention/statistics.py`: no map is made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from rave_jax.attention import WantedStatistics
from rave_jax.batch import Batch
from rave_jax.evaluation.probe import Answered, Found
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from rave_jax.typing import Array, Bool, Float, Int, NpArray

WINDOW = 10
"""W: the most that a distance counts in WAAD."""
BAND = (10, 50)
"""The least and the largest distance of FAI."""
PART = 0.3
"""Heads that are local, and heads that are global, as a part of all."""
LAYERS = 5


class SpanSums(NamedTuple):
    """What is read of each row of a batch, in the chosen layers: sums of the map, and which tokens are the answer."""

    spans: Float[Array, "B L N T H"]
    columns: Float[Array, "B L T H"]
    answer: Bool[Array, "B T"]


class Curves(NamedTuple):
    """Of one answer of R tokens.

    Fields:
        spans: d of the chosen layers and their heads.
        waad: of each token.
        fai: of each token; NaN where no later token is far enough.
        near, far: mean d of the local and of the global heads.
    """

    spans: Float[NpArray, "L H"]
    waad: Float[NpArray, "R"]
    fai: Float[NpArray, "R"]
    near: float
    far: float


def middle_layers(count: int) -> tuple[int, ...]:
    """Five of so many layers that attend, evenly spaced over their middle third; fewer where it has fewer."""
    first, last = count // 3, max(count - count // 3 - 1, count // 3)
    return tuple(int(n) for n in np.unique(np.linspace(first, last, LAYERS).round().astype(int)))


def answer_spans(model: Vlm, batch: Batch, answer: Bool[Array, "B T"]) -> SpanSums:
    """What the answers' rows and columns add up to; computed on the devices.

    Args:
        model: the model.
        batch: prompts with their answers, one a row.
        answer: which tokens are the answer.
    """
    asked = WantedStatistics(answer.astype("float32"), (None, WINDOW), (BAND,))
    found = model.forward(batch, Want(statistics=asked)).statistics
    assert found is not None and found.spans is not None and found.columns is not None
    layers = np.array(middle_layers(len(found.spans)))
    return SpanSums(found.spans[layers].swapaxes(0, 1), found.columns[layers, :, 0].swapaxes(0, 1), answer)


def curves(sums: SpanSums) -> Curves | None:
    """WAAD and FAI of one row; None for an answer without tokens.

    Args:
        sums: of one row, without its axis B.
    """
    tokens = np.flatnonzero(sums.answer)
    if not len(tokens):
        return None
    spans, columns = np.asarray(sums.spans, np.float64)[:, :, tokens], np.asarray(sums.columns, np.float64)[:, tokens]
    mean = spans[:, 0].mean(axis=1)
    order = np.argsort(mean.ravel(), kind="stable")
    count = max(1, round(PART * len(order)))
    local, everywhere = (np.unravel_index(some, mean.shape) for some in (order[:count], order[-count:]))
    readers = _readers(tokens)
    total = columns[everywhere[0], :, everywhere[1]].mean(axis=0)
    return Curves(
        spans=mean,
        waad=spans[local[0], 1, :, local[1]].mean(axis=0),
        fai=np.where(readers > 0, total / np.maximum(readers, 1), np.nan),
        near=float(mean[local].mean()),
        far=float(mean[everywhere].mean()),
    )


def _readers(tokens: Int[NpArray, "R"]) -> Int[NpArray, "R"]:
    """How many of the tokens are in the band behind each."""
    away = tokens[:, None] - tokens
    return np.sum((away >= BAND[0]) & (away <= BAND[1]), axis=0)


@dataclass(frozen=True)
class SpanMeans:
    """Means over answers, in tokens of the conversation.

    Attributes:
        samples: answers that were read.
        near, far: how far back local and global heads attend.
        waad: mean over answers of the mean over tokens.
        fai: the same of tokens that have one; None where none has.
    """

    samples: int
    near: float
    far: float
    waad: float
    fai: float | None

    def values(self) -> dict[str, float]:
        """All means that there are."""
        found = {"near": self.near, "far": self.far, "waad": self.waad}
        return found if self.fai is None else found | {"fai": self.fai}

    def sentences(self) -> list[str]:
        """The finding in words."""
        later = f"no answer is longer than {BAND[0]} tokens, so there is no FAI" if self.fai is None else ""
        later = later or f"FAI {self.fai:.4f}, what later tokens give to each"
        return [
            f"answers attend {self.near:.1f} tokens back in local heads and {self.far:.1f} in global ones; WAAD "
            f"{self.waad:.2f}; {later} ({self.samples:,} answers)"
        ]


@dataclass(frozen=True)
class SpanProbe:
    """Measures so many answers; writes the curves of each to `spans.jsonl`."""

    samples: int
    name: ClassVar[str] = "spans"

    def measure(self, answered: Answered) -> Found:
        """Nothing where no sample is asked for, or no answer has tokens."""
        lines, found = [], []
        for block in answered.blocks(self.samples):
            read = answered.subject.per_sample(answer_spans, block.samples, block.answers)
            for sample, answer, sums in zip(block.samples, block.answers, read or (), strict=read is not None):
                one = curves(sums)
                if one is None:
                    continue
                found.append(one)
                fai = [None if np.isnan(x) else round(float(x), 6) for x in one.fai]
                waad = [round(float(x), 4) for x in one.waad]
                lines.append(json.dumps({"id": sample.id, "tokens": answer.tokens, "waad": waad, "fai": fai}) + "\n")
        if not found:
            return Found(None)
        if answered.out is not None:
            answered.out.mkdir(parents=True, exist_ok=True)
            (answered.out / "spans.jsonl").write_text("".join(lines), encoding="utf-8")
        fai = [float(np.nanmean(one.fai)) for one in found if not np.isnan(one.fai).all()]
        near, far = (float(np.mean([getattr(one, name) for one in found])) for name in ("near", "far"))
        waad = float(np.mean([one.waad.mean() for one in found]))
        return Found(SpanMeans(len(found), near, far, waad, float(np.mean(fai)) if fai else None))

    @staticmethod
    def section(finding: Mapping[str, Any]) -> list[str]:
        """Lines of the report."""
        means = SpanMeans(**{field.name: finding[field.name] for field in dataclasses.fields(SpanMeans)})
        return ["### How far back answers attend", "", *(f"{line}." for line in means.sentences()), ""]
