"""What a query ranks regions by: descriptors of their keys, and the features of a query that meet them.

Every rule here is an inner product <x(q), d(region)>, and every d comes from sums (or extremes) over the region's keys
that are combined from parts, so that a prompt may be read chunk by chunk and nothing is computed twice. All float32.

    mean      x = q                                d = mean k                    Gaze Attention, arXiv 2605.13080
    min_max   x = [relu(q), -relu(-q)]             d = [max k, min k]            Quest, arXiv 2406.10774: bounds <q, k>
    spread    x = [q / sqrt(h), q^2 / (2 h)]       d = [mean k, var k]           log mean exp of a diagonal Gaussian
    learned   x = q                                d = sum_j a_j k_j             a = softmax over the region of g(k)
    random    x = q, signs by the query's place    d = noise by the region's place: a control
    nothing   no features: for a rule that ranks by attention mass, a control

With random keys a mean of few keys varies more, so that small regions at the edges of a picture get more places than
their share. `evened` takes that out of means: with n of m keys, and the mean of all keys of its frames,

    d = mean_frames k + sqrt(n / m) (mean k - mean_frames k)

which varies as a mean of m keys does (ours). A whole region keeps its mean.

h is head_dim; `spread` is the second-order term of the log of the region's attention mass, our own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.typing import Array, Bool, Float, Int

DescriptorName = Literal["mean", "min_max", "spread", "learned", "random", "oracle"]
LIMIT = 8.0
"""Bound of a learned pooling's logits, so that sums of their exponentials need no running maximum."""


class Sums(NamedTuple):
    """Weighted sums over the keys of each region: of 1, k and k^2 (None where nobody reads it)."""

    weight: Float[Array, "B R K"]
    first: Float[Array, "B R K h"]
    second: Float[Array, "B R K h"] | None


class Extremes(NamedTuple):
    """Least and greatest of each channel over the keys of each region; +inf and -inf where it has none."""

    least: Float[Array, "B R K h"]
    greatest: Float[Array, "B R K h"]


Summary = Sums | Extremes | None


def summarise(
    name: DescriptorName,
    k: Float[Array, "B S K h"],
    logits: Float[Array, "B S K"] | None,
    region: Int[Array, "B S"],
    R: int,
) -> Summary:
    """What the descriptors need of these keys. Region n (from 1; 0 is none) is entry n - 1.

    Args:
        name: the descriptor.
        k: the keys.
        logits: of a learned pooling.
        region: of each key.
        R: regions.
    """
    if name in ("random", "oracle"):
        return None
    k = k.astype(jnp.float32)
    if name == "min_max":
        return Extremes(_reduce(jax.ops.segment_min, k, region, R), _reduce(jax.ops.segment_max, k, region, R))
    weight = jnp.ones(k.shape[:3]) if logits is None else jnp.exp(LIMIT * jnp.tanh(logits / LIMIT))
    second = _sum(weight[..., None] * k**2, region, R) if name == "spread" else None
    return Sums(_sum(weight, region, R), _sum(weight[..., None] * k, region, R), second)


def combine(old: Summary, new: Summary) -> Summary:
    """The summary of the keys of both."""
    if old is None or new is None:
        return None
    if isinstance(old, Extremes):
        assert isinstance(new, Extremes)
        return Extremes(jnp.minimum(old.least, new.least), jnp.maximum(old.greatest, new.greatest))
    return jax.tree.map(jnp.add, old, new)


def describe(
    name: DescriptorName, summary: Summary, shape: tuple[int, int, int, int], place: Int[Array, "B R"]
) -> Float[Array, "B R K c"]:
    """Descriptors of all regions, 0 where there is none.

    Args:
        name: the descriptor.
        summary: of the regions' keys.
        shape: [B,R,K,h].
        place: of each region's first key in its document.
    """
    if name == "oracle":
        return jnp.zeros((*shape[:3], 1))
    if name == "random":
        noise = _by_place(place, lambda key: jax.random.normal(key, (1, shape[3])))
        return jnp.broadcast_to(noise, shape)
    if isinstance(summary, Extremes):
        found = jnp.isfinite(summary.least)
        return jnp.concatenate([jnp.where(found, x, 0.0) for x in (summary.greatest, summary.least)], axis=-1)
    assert isinstance(summary, Sums)
    weight = jnp.where(summary.weight > 0, summary.weight, 1.0)[..., None]
    mean = summary.first / weight
    if summary.second is None:
        return mean
    return jnp.concatenate([mean, jnp.maximum(summary.second / weight - mean**2, 0.0)], axis=-1)


def evened(
    mean: Float[Array, "B R K h"], summary: Summary, begins: Bool[Array, "B R"], m: int
) -> Float[Array, "B R K h"]:
    """Means of regions with less than m keys, drawn towards the mean of their frames.

    Args:
        mean: `describe` of "mean".
        summary: of the regions' keys.
        begins: is the region the first of its frames? Those that follow share them.
        m: keys of a whole region.
    """
    assert isinstance(summary, Sums)
    group, R = jnp.cumsum(begins, axis=1), begins.shape[1]
    first, weight = (
        jax.vmap(lambda x, at: jax.ops.segment_sum(x, at, num_segments=R + 1)[at])(x, group)
        for x in (summary.first, summary.weight)
    )
    around = first / jnp.where(weight > 0, weight, 1.0)[..., None]
    share = jnp.sqrt(summary.weight / m)[..., None]
    return jnp.where(summary.weight[..., None] > 0, mean + (share - 1.0) * (mean - around), mean)


def features(name: DescriptorName, q: Float[Array, "B T H h"], place: Int[Array, "B T"]) -> Float[Array, "B T H c"]:
    """What of queries, which stand at `place` in their documents, meets the descriptors."""
    q = q.astype(jnp.float32)
    h = q.shape[-1]
    if name == "oracle":
        return jnp.zeros((*q.shape[:3], 1))
    if name == "min_max":
        return jnp.concatenate([jax.nn.relu(q), -jax.nn.relu(-q)], axis=-1)
    if name == "spread":
        return jnp.concatenate([q * h**-0.5, q**2 / (2 * h)], axis=-1)
    if name == "random":
        # What queries have in common must not favour a region, nor training find one.
        return q * _by_place(place, lambda key: jax.random.rademacher(key, q.shape[2:], jnp.float32))
    return q


def _by_place(place: Int[Array, "B n"], draw: Callable[[Array], Array]) -> Array:
    """Numbers [B,n,...] that are the same wherever the document stands."""
    key = jax.random.key(0)
    return jax.vmap(jax.vmap(lambda at: draw(jax.random.fold_in(key, at))))(place)


def _sum(x: Array, region: Int[Array, "B S"], R: int) -> Array:
    """Sums over each region's keys, as one product: regions are few, and a scatter goes key by key."""
    of = (region[:, :, None] == jnp.arange(1, R + 1)).astype(jnp.float32)
    return jnp.einsum("BSR,BS...->BR...", of, x, precision=jax.lax.Precision.HIGHEST)


def _reduce(how: Any, x: Array, region: Int[Array, "B S"], R: int) -> Array:
    return jax.vmap(lambda rows, at: how(rows, at, num_segments=R + 1))(x, region)[:, 1:]
