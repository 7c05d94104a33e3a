"""Rows of the attention map on demand: exact weights of chosen queries from the saved log-sum-exp, O(N S)."""

from __future__ import annotations

import jax.numpy as jnp

from rave_jax.attention.base import KeyFactor
from rave_jax.attention.scores import Scores, of_queries, pick
from rave_jax.kernels.pair_bias import KeySegments
from rave_jax.typing import Array, Float, Int


def attention_rows(
    scores: Scores,
    lse: Float[Array, "B T H"],
    rows: Int[Array, "B N"],
    factor: KeyFactor | None = None,
    segments: KeySegments | None = None,
    weights: Float[Array, "B T M H"] | None = None,
) -> Float[Array, "B N H S"]:
    """Attention weights of queries `rows` [B,N] over all keys, float32; a row that may see nothing is zero.

    Args:
        scores: of all pairs.
        lse: of the weights that are asked for, after whatever changed them.
        rows: queries, by index.
        factor: the key of each query whose weight was multiplied, or None.
        segments, weights: log factors of M segments, or None.
    """
    found, allowed = of_queries(scores, rows)
    if factor is not None:
        at_key = pick(factor.key, rows)[..., None] == jnp.arange(found.shape[-1])
        found = found + at_key[:, :, None] * factor.log[:, None]
    if weights is not None and segments is not None:
        of_key = jnp.broadcast_to(segments.of[:, None, None], found.shape)
        found = found + jnp.take_along_axis(jnp.moveaxis(pick(weights, rows), 2, 3), of_key, axis=-1, mode="clip")
    norm = pick(lse, rows)[..., None]
    return jnp.where(allowed, jnp.exp(found - jnp.where(norm == -jnp.inf, 0.0, norm)), 0.0)
