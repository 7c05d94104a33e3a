"""The oracle: the scores of every entry of every region, by the maths of `kernels.attention`, and a mask."""

from __future__ import annotations

import jax.numpy as jnp

from rave_jax.kernels.attention import PairBias, PairForm, Terms
from rave_jax.kernels.attention.base import tile_scores
from rave_jax.kernels.routed.gather.base import Operands
from rave_jax.typing import Array, Float


def attention(
    operands: Operands, most: int, form: PairForm, scale: float
) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Dense attention; see `api.gather_attention`. `most` changes nothing here."""
    q, _, _, real, chosen, bias = operands
    k, v = operands.k.whole(), operands.v.whole()
    B, K, R, m, _ = k.shape
    S = R * m

    def keys(x: Array) -> Array:
        """[B,K,R,m,...] as [B,S,K,...]."""
        return jnp.swapaxes(x.reshape(B, K, S, *x.shape[4:]), 1, 2)

    pair = None
    if bias is not None:
        u, row, on = (x[:, None] for x in (bias.u, bias.row, bias.query_on))
        pair = PairBias(u, keys(bias.w), row, keys(bias.key), bias.gain, on, real.reshape(B, S))
    scores = tile_scores(q[:, :, :, None], keys(k.astype(q.dtype)), Terms(pair, None), form, scale)[:, :, :, 0]
    open_ = (chosen[..., None] & real[:, None, None]).reshape(B, K, -1, S)
    scores = jnp.where(open_, scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.where(open_, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.einsum("BKGS,BSKc->BKGc", weights / safe[..., None], keys(v))
    return out, jnp.where(seen, jnp.log(safe) + top[..., 0], -jnp.inf)
