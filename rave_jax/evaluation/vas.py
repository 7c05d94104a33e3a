"""Visual attention score (VAS): how much more a question's text attends to the picture than to the system prompt.

Source: arXiv 2603.03825, read in a digest. With V the visual keys and SYS those of the system prompt:

    VAS = mean over layers, heads and rows i of   sum over V of P_ij  /  sum over SYS of P_ij

where rows are the user's text after the image. Both sums come from log-sum-exps of key groups, so no map is made.

Our reading: rows are text tokens of role question that see a picture and a system prompt, and the mean is over all such
rows of all samples, all layers and all heads alike. P is the attention that the layer applies, after every mechanism.

It is read by a mechanism that changes nothing, put into a copy of the model that shares its weights. So it costs three
runs of the kernel in each layer when it is asked for, and nothing otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention import Features, Mechanism, Parts
from rave_jax.attention.avar import COUNT, SYSTEM, VISUAL, key_group_of
from rave_jax.batch import Batch, Kind, Role, TokenInfo
from rave_jax.evaluation.probe import Answered, Found
from rave_jax.kernels.attention import KeyGroups
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from rave_jax.typing import Array, Float


class VasSums(NamedTuple):
    """VAS before it is divided, so that those of several batches add up: the ratios' sum over rows, heads and layers,
    and how many they are."""

    total: Float[Array, ""] | float
    ratios: Float[Array, ""] | float


@dataclass(frozen=True)
class Vas:
    """VAS over samples of an evaluation.

    Attributes:
        samples: how many were read.
        ratios: how many the mean is over: one for each row in each head and layer.
        score: the mean; None where there are no ratios.
    """

    samples: int
    ratios: int
    score: float | None

    def values(self) -> dict[str, float]:
        """The mean, where there is one."""
        return {} if self.score is None else {"score": self.score}

    def sentences(self) -> list[str]:
        """The finding in words."""
        if self.score is None:
            return [f"VAS: none of {self.samples:,} samples has a question after both a system prompt and a picture"]
        return [
            f"VAS {self.score:.3f}: how many times as much questions attend to the picture as to the system prompt "
            f"({self.samples:,} samples, {self.ratios:,} rows in heads and layers)"
        ]


@dataclass(frozen=True)
class VasProbe:
    """Measures VAS on so many samples."""

    samples: int
    name: ClassVar[str] = "vas"

    def measure(self, answered: Answered) -> Found:
        """Nothing where no sample is asked for."""
        if self.samples == 0:
            return Found(None)
        samples, total, ratios = 0, 0.0, 0.0
        for block in answered.blocks(self.samples):
            found = answered.subject.vas(block.samples)
            samples += len(block.samples)
            total, ratios = total + float(found.total), ratios + float(found.ratios)
        return Found(Vas(samples, round(ratios), total / ratios if ratios else None))

    @staticmethod
    def section(finding: Mapping[str, Any]) -> list[str]:
        """Lines of the report."""
        return ["### Visual attention score", "", *(f"{line}." for line in Vas(**finding).sentences()), ""]


class VasReading(Mechanism):
    """Sums and counts of VAS through the hook for losses. It is in no config, so that no training adds them up."""

    def key_groups(self, x: Features, remembered: None, info_k: TokenInfo) -> KeyGroups:
        """The picture, the system prompt, the rest."""
        return KeyGroups(key_group_of(info_k), COUNT)

    def losses(self, x: Features, parts: Parts, info_q: TokenInfo, info_k: TokenInfo) -> dict[str, Float[Array, ""]]:
        """The ratios, summed over rows and heads, and how many they are."""
        picture, prompt = parts.groups[:, :, VISUAL], parts.groups[:, :, SYSTEM]
        asks = (info_q.kind == Kind.TEXT) & (info_q.role == Role.QUESTION)
        counts = asks[..., None] & (picture > -jnp.inf) & (prompt > -jnp.inf)
        ratios = jnp.exp(jnp.where(counts, picture - prompt, -jnp.inf))
        return {"vas": jnp.sum(ratios), "vas_rows": jnp.sum(counts, dtype=jnp.float32)}


def with_vas(model: Vlm) -> Vlm:
    """The model with the reading in every layer; it shares its arrays."""
    model = jax.tree.map(lambda x: x, model)
    for run in model.decoder.layer_runs:
        run.layers.mechanisms.append(VasReading())
    return model


def vas_sums(reading: Vlm, batch: Batch) -> VasSums:
    """What the rows of a batch add to VAS; nothing where none has a picture, a system prompt and a question after both.

    Args:
        reading: what `with_vas` gave.
        batch: rows of documents.
    """
    found = reading.forward(batch, Want(losses=True)).losses
    return VasSums(found["vas"], found["vas_rows"])
