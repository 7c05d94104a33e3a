"""Secondary sinks: tokens whose hidden state takes the direction of the first token's for some layers.

Source: arXiv 2512.22213 and its released code (`hidden_state_base.py`, with a chat template). With x^l_j the hidden
state of token j that leaves layer l of L, counted from 0, the last one after the final norm:

    BOS: of the first three tokens the one with the largest mean norm
    active layers: from the one with the largest increase of |x_BOS| over the layer before, up to before the one with
                   the largest decrease behind it
    j, BOS or behind it, is a sink of an active layer if |cos(x_j, x_BOS)| > 0.9
    lifetime of j: in how many layers it is one.   L - 15 and more: like BOS.   5 to L - 16: secondary.   up to 4: noise

The rule needs a model of at least 21 layers: in others no lifetime is secondary. It looks at hidden states alone, so it
is the same for any attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from rave_jax.batch import Batch, Kind
from rave_jax.config import ConfigError
from rave_jax.evaluation.markdown import table
from rave_jax.evaluation.probe import Answered, Found
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from rave_jax.typing import Array, Bool, Float, Int, NpArray

FIRST, ALIKE, NOISE, SHORT_OF = 3, 0.9, 4, 15
"""Tokens among which BOS is; the cosine of a sink; the longest lifetime of noise; how much shorter than the model the
lifetime of what is like BOS may be."""
LEVELS = 5
"""Pairs of first layer and lifetime that are reported, the most frequent first."""


class HiddenStates(NamedTuple):
    """What is read of each row of a batch; M is 3, of the tokens that may be BOS."""

    norms: Float[Array, "B L M"]
    alike: Float[Array, "B L M T"]
    visual: Bool[Array, "B T"]
    real: Bool[Array, "B T"]


class Sinks(NamedTuple):
    """What each token of a row is: in how many layers a sink, from which layer on (0 where it is none)."""

    lifetime: Int[NpArray, "T"]
    first: Int[NpArray, "T"]


def check_depth(layers: int) -> None:
    """Refuse a model in which no sink can be secondary.

    Raises:
        ConfigError: names the field `sinks`.
    """
    least = NOISE + 2 + SHORT_OF
    if layers < least:
        raise ConfigError(
            f"sinks is above 0, but the model has {layers} layers, and the rule for secondary sinks needs at least "
            f"{least}; expected 0"
        )


def hidden_states(model: Vlm, batch: Batch, answer: Bool[Array, "B T"]) -> HiddenStates:
    """Norms of the first tokens, and cosines of all tokens with them; computed on the devices.

    Args:
        model: the model.
        batch: prompts with their answers, one a row.
        answer: which tokens are the answer.
    """
    out = model.forward(batch, Want(inputs=True))
    assert out.inputs is not None
    # What enters a layer left the one before.
    x = jnp.concatenate([out.inputs[1:], out.hidden[None].astype(out.inputs.dtype)])
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    first = x[:, :, :FIRST]
    products = jnp.einsum("LBMD,LBTD->LBMT", first, x, preferred_element_type=jnp.float32)
    alike = jnp.abs(products) / jnp.maximum(norms[:, :, :FIRST, None] * norms[:, :, None], 1e-30)
    real = batch.info.document > 0
    visual = real & (batch.info.kind == Kind.VISUAL)
    return HiddenStates(norms[:, :, :FIRST].swapaxes(0, 1), alike.swapaxes(0, 1), visual, real)


def sinks_of(states: HiddenStates) -> Sinks:
    """The sinks of one row.

    Args:
        states: of one row, without its axis B.
    """
    norms = np.asarray(states.norms, np.float64)
    bos = int(np.argmax(norms.mean(axis=0)))
    steps = np.diff(norms[:, bos])
    start = int(np.argmax(steps)) + 1
    # Where the last layer has the largest increase, nothing decreases behind it.
    end = start + 1 + (int(np.argmin(steps[start:])) if start < len(steps) else 0)
    active = np.zeros(len(norms), bool)
    active[start:end] = True
    sink = active[:, None] & (np.asarray(states.alike)[:, bos] > ALIKE) & np.asarray(states.real)
    sink[:, :bos] = False
    return Sinks(sink.sum(axis=0), np.argmax(sink, axis=0))


@dataclass(frozen=True)
class SinkCounts:
    """Means over conversations of a prompt and its answer.

    Attributes:
        samples: conversations that were read.
        bos, secondary, noise: tokens of each kind in one of them.
        visual: the part of the secondary sinks that are visual tokens; None where there are none.
        levels: (first layer, lifetime, secondary sinks in all samples), the most frequent first.
    """

    samples: int
    bos: float
    secondary: float
    noise: float
    visual: float | None
    levels: tuple[tuple[int, int, int], ...]

    def values(self) -> dict[str, float]:
        """The counts."""
        return {"bos": self.bos, "secondary": self.secondary, "noise": self.noise}

    def sentences(self) -> list[str]:
        """The finding in words."""
        of = "" if self.visual is None else f", {self.visual:.0%} of them visual tokens"
        return [
            f"a conversation has {self.secondary:.2f} secondary sinks{of}, and {self.bos:.2f} tokens that are sinks "
            f"for as long as the first ({self.samples:,} samples)"
        ]


@dataclass(frozen=True)
class SinkProbe:
    """Counts the secondary sinks of so many prompts with their answers."""

    samples: int
    name: ClassVar[str] = "sinks"

    def measure(self, answered: Answered) -> Found:
        """Nothing where no sample is asked for."""
        kinds: list[tuple[int, int, int]] = []
        levels: Counter[tuple[int, int]] = Counter()
        visual = 0
        for block in answered.blocks(self.samples):
            for states in answered.subject.per_sample(hidden_states, block.samples, block.answers) or ():
                life, first = sinks_of(states)
                lasting = life >= len(states.norms) - SHORT_OF
                secondary = (life > NOISE) & ~lasting
                kinds.append((int(lasting.sum()), int(secondary.sum()), int((life > 0).sum())))
                visual += int((secondary & np.asarray(states.visual)).sum())
                levels.update(zip(first[secondary].tolist(), life[secondary].tolist(), strict=True))
        if not kinds:
            return Found(None)
        bos, secondary, every = np.sum(kinds, axis=0).tolist()
        share = visual / secondary if secondary else None
        most = tuple((*level, count) for level, count in sorted(levels.items(), key=lambda x: (-x[1], x[0]))[:LEVELS])
        n = len(kinds)
        return Found(SinkCounts(n, bos / n, secondary / n, (every - bos - secondary) / n, share, most))

    @staticmethod
    def section(finding: Mapping[str, Any]) -> list[str]:
        """Lines of the report."""
        counts = SinkCounts(**finding)
        page = ["### Secondary sinks", "", *(f"{line}." for line in counts.sentences()), ""]
        if not counts.levels:
            return page
        rows = [[str(first), str(life), f"{count:,}"] for first, life, count in counts.levels]
        return [*page, *table(["first layer", "lifetime in layers", "secondary sinks"], rows, left=0), ""]
