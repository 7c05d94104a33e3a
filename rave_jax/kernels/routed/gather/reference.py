"""The oracle: the scores of every entry of every region, by the maths of `kernels.attention`, and a mask."""

from __future__ import annotations

import jax.numpy as jnp

from rave_jax.kernels.attention import Terms
from rave_jax.kernels.attention.base import tile_scores
from rave_jax.kernels.routed.gather.base import Operands
from rave_jax.typing import Array, Float


def attention(operands: Operands, most: int, scale: float) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Dense attention; see `api.gather_attention`. `most` changes nothing here."""
    q, _, _, real, chosen, terms = operands
    k, v = operands.k.whole(), operands.v.whole()
    B, K, R, m, _ = k.shape
    S = R * m

    def keys(x: Array) -> Array:
        """[B,K,R,m,...] as [B,S,K,...]."""
        return jnp.swapaxes(x.reshape(B, K, S, *x.shape[4:]), 1, 2)

    parts = tuple(
        term.map_queries(lambda x: x[:, None]).replace(
            w=None if term.w is None else keys(term.w),
            key={name: keys(x) for name, x in term.key.items()},
            key_on=None if term.key_on is None else term.key_on.reshape(B, S),
        )
        for term in terms
    )
    scores = tile_scores(q[:, :, :, None], keys(k.astype(q.dtype)), Terms(parts), scale)[:, :, :, 0]
    open_ = (chosen[..., None] & real[:, None, None]).reshape(B, K, -1, S)
    scores = jnp.where(open_, scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.where(open_, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1)
    seen = total != 0  # NaN counts as seen, and stays
    safe = jnp.where(seen, total, 1.0)
    out = jnp.einsum("BKGS,BSKc->BKGc", weights / safe[..., None], keys(v))
    return out, jnp.where(seen, jnp.log(safe) + top[..., 0], -jnp.inf)
