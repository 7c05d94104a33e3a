"""Rows of the attention map on demand: exact weights of chosen queries from the saved log-sum-exp, O(N S)."""

from __future__ import annotations

import jax.numpy as jnp

from rave_jax.kernels.pair_bias.base import (
    MaskCodes,
    PairForm,
    Terms,
    group_heads,
    tile_allow,
    tile_scores,
    ungroup_heads,
)
from rave_jax.typing import Array, Float, Int


def attention_rows(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    codes: MaskCodes,
    terms: Terms,
    form: PairForm,
    scale: float,
    lse: Float[Array, "B T H"],
    rows: Int[Array, "B N"],
) -> Float[Array, "B N H S"]:
    """Attention weights of queries `rows` [B,N] over all keys, float32; a row that may see nothing is zero."""

    def pick(x: Array) -> Array:
        return jnp.take_along_axis(x, rows.reshape(*rows.shape, *[1] * (x.ndim - 2)), axis=1)

    K = k.shape[2]
    codes = codes._replace(lo=pick(codes.lo), hi=pick(codes.hi), open_q=pick(codes.open_q))
    pair = terms.pair
    if pair is not None:
        pair = pair._replace(u=pick(pair.u), row=pick(pair.row), query_on=pick(pair.query_on))
    scores = tile_scores(group_heads(pick(q), K), k, terms._replace(pair=pair), form, scale)
    norm = group_heads(pick(lse), K)[..., None]
    weights = jnp.where(tile_allow(codes), jnp.exp(scores - jnp.where(norm == -jnp.inf, 0.0, norm)), 0.0)
    return ungroup_heads(weights)
