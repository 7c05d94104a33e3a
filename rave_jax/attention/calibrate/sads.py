"""Finds the heads that SADS drops, from what the heads of a trained model attend to.

Source: openreview.net xTbFeDhdRG, from notes on the paper; no code was found. With P the attention of text queries:

- vision heads: x_h is the largest attention of a head to a visual token. Over the heads of late layers x_h has two
  heaps; alpha is the valley of a mixture of two normal distributions; x_h > alpha is a vision head, others are sinks.
- sink_G and sink_S: I are the keys that are not visual, rows are normalised over I, p_j is the mean over rows and
  H_h = - sum_j p_j log p_j. Over the sinks H_h has two heaps with the valley beta; H_h > beta is sink_G, which stays.
  An earlier version of the paper keeps the quarter of the sinks with the largest H_h.
- head 0 of each layer stays. What is left, sink_S, is dropped.
- late layers: from the first layer m where the gradient of visual attention is sparse and the variance of keys jumps.
  The paper has m = 20 of 36 (Qwen2.5-VL-3B), 15 of 24 (InternVL2-2B), 20 of 32 (LLaVA-1.5-7B).

Not in the notes, and ours: x_h is the largest, over visual tokens, of the mean over text queries, with P normalised
over all keys; x_h and H_h are means over samples, and H_h is divided by the log of the number of keys, since samples
differ in length; heaps are pooled over late layers. Sparsity is Hoyer's, over the heads of a layer, of the size of the
gradient of the loss by a gate on each head's output. The variance of a layer's keys is over visual tokens, before RoPE,
averaged over kv heads and channels. Layer m is the first from which on the variance is above twice the median of the
middle third of layers, and the sparsity above its median there. Where there is one heap and not two nothing is dropped,
and of the query heads of a kv head at least one stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from rave_jax.attention.calibrate.mixture import valley
from rave_jax.attention.calibrate.tables import heads_and_layers
from rave_jax.attention.sads import Sads
from rave_jax.config import ConfigError, check_fields, require
from rave_jax.typing import Array, Bool, Float, NpArray


@dataclass(frozen=True)
class SadsSearch:
    """How the heads that collapsed are looked for."""

    start: int = -1
    """First of the late layers, counted from 0; -1 finds it from gradients and keys, and is refused where they do not
    show it."""
    keep: Literal["entropy", "quarter"] = "entropy"
    """Which sinks stay: those whose entropy is above the valley, or the quarter of them with the largest entropy."""
    jump: float = 2.0
    """How many times the median of the middle layers the variance of keys has to be in late layers."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.start >= -1, "start", self.start, "a number of a layer, or -1")
        require(self.jump > 1, "jump", self.jump, "a number above 1")


class HeadStats(NamedTuple):
    """What heads attend to, and what shows where late layers begin; each a mean over samples.

    Fields:
        peak: x_h, the largest attention to a visual token.
        entropy: H_h over its largest value, of the attention to keys that are not visual.
        sparsity: of the gradient of each layer's heads, 0 to 1.
        variance: of each layer's visual keys.
    """

    peak: Float[NpArray, "L H"]
    entropy: Float[NpArray, "L H"]
    sparsity: Float[NpArray, "L"]
    variance: Float[NpArray, "L"]


class Sparsified(NamedTuple):
    """What was found; a threshold is None where the heads are one heap.

    Fields:
        start: first of the late layers.
        alpha, beta: thresholds of x_h and H_h.
        vision, spread: which heads are vision heads, and which sinks are sink_G.
        dropped: which heads are dropped.
    """

    start: int
    alpha: float | None
    beta: float | None
    vision: Bool[NpArray, "L H"]
    spread: Bool[NpArray, "L H"]
    dropped: Bool[NpArray, "L H"]

    @property
    def configs(self) -> tuple[Sads, ...]:
        """The mechanisms to put into a model's config, one for all layers that drop the same heads."""
        return tuple(Sads(heads, layers=layers) for heads, layers in heads_and_layers(self.dropped))


def sparsify(search: SadsSearch, stats: HeadStats, kv_heads: int) -> Sparsified:
    """Which heads of late layers are dropped.

    Args:
        search: how.
        stats: of the model's heads.
        kv_heads: of each layer; query heads stand in order of their kv head.

    Raises:
        ConfigError: `start` is beyond the layers, or is to be found and is not shown; or a number is not finite.
    """
    L, H = stats.peak.shape
    if not all(np.isfinite(field).all() for field in stats):
        raise ConfigError("what heads attend to is not finite: check the model's weights and number types")
    require(search.start < L, "start", search.start, f"a number from 0 to {L - 1}, or -1")
    start = search.start if search.start >= 0 else late_from(stats, search.jump)
    if start is None:
        raise ConfigError(
            "no layer is shown as the first late one by its gradients and keys; give --start with its number (the "
            "paper has 20 of 36 layers, 15 of 24 and 20 of 32)"
        )
    late = np.arange(L)[:, None] >= np.full((L, H), start)
    alpha = valley(stats.peak[late])
    vision = late & (stats.peak > alpha) if alpha is not None else late
    sinks = late & ~vision
    beta = valley(stats.entropy[sinks])
    if search.keep == "quarter" and sinks.any():
        beta = float(np.quantile(stats.entropy[sinks], 0.75, method="lower"))
    spread = sinks & (stats.entropy > beta) if beta is not None else sinks
    dropped = sinks & ~spread
    dropped[:, 0] = False
    groups = dropped.reshape(L, kv_heads, H // kv_heads)
    for layer, group in np.argwhere(groups.all(-1)):
        best = np.argmax(stats.entropy.reshape(groups.shape)[layer, group])
        groups[layer, group, best] = False
    return Sparsified(start, alpha, beta, vision, spread, groups.reshape(L, H))


def late_from(stats: HeadStats, jump: float) -> int | None:
    """The first layer from which on, to the last, keys vary more than `jump` times and gradients are sparser than in
    the middle third of layers; None where there is none."""
    L = len(stats.variance)
    middle = slice(L // 3, max(2 * L // 3, L // 3 + 1))
    late = (stats.variance > jump * np.median(stats.variance[middle])) & (
        stats.sparsity > np.median(stats.sparsity[middle])
    )
    (early,) = np.nonzero(~late)
    first = int(early[-1]) + 1 if len(early) else 0
    return first if first < L else None


def hoyer(gradient: Float[NpArray, "*L H"]) -> Float[NpArray, "*L"]:
    """Hoyer's sparsity (sqrt(H) - |g|_1 / |g|_2) / (sqrt(H) - 1): 0 where all are equal, 1 where one is all; 0 of
    nothing and of a single head."""
    g = np.abs(np.asarray(gradient, np.float64))
    size, root = np.sqrt((g**2).sum(-1)), np.sqrt(g.shape[-1])
    if g.shape[-1] == 1:
        return np.zeros(g.shape[:-1])
    return np.where(size > 0, (root - g.sum(-1) / np.where(size > 0, size, 1)) / (root - 1), 0.0)


def peak_and_entropy(
    attention: Float[Array, "*B N H S"],
    rows: Bool[Array, "*B N"],
    visual: Bool[Array, "*B S"],
    other: Bool[Array, "*B S"],
) -> tuple[Float[Array, "*B H"], Float[Array, "*B H"]]:
    """x_h, and H_h over the log of the number of keys, of each sample.

    Args:
        attention: of N queries over all keys.
        rows: which queries are text of the sample.
        visual, other: which keys are visual, and which are the rest of the sample's.
    """
    weights = rows / jnp.maximum(jnp.sum(rows, axis=-1, keepdims=True), 1)
    mean = jnp.einsum("...N,...NHS->...HS", weights, attention)
    peak = jnp.max(jnp.where(visual[..., None, :], mean, 0.0), axis=-1)
    rest = jnp.where(other[..., None, None, :], attention, 0.0)
    total = jnp.sum(rest, axis=-1, keepdims=True)
    p = jnp.einsum("...N,...NHS->...HS", weights, rest / jnp.where(total > 0, total, 1.0))
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    count = jnp.sum(other, axis=-1, keepdims=True)
    return peak, entropy / jnp.log(jnp.maximum(count, 2))
