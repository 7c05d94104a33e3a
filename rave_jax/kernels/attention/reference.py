"""The oracle: the whole map at once, differentiated by jax."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention.base import (
    MaskCodes,
    Terms,
    group_heads,
    tile_allow,
    tile_scores,
    ungroup_heads,
)
from rave_jax.typing import Array, Float


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Terms,
    scale: float,
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """Dense attention; see `api.attention`. Makes [B,H,T,S] arrays."""
    scores = tile_scores(group_heads(q, k.shape[2]), k, terms, scale)
    allow = tile_allow(codes)
    scores = jnp.where(allow, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min))
    weights = jnp.where(allow, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1)
    seen = total != 0  # NaN counts as seen, and stays
    safe = jnp.where(seen, total, 1.0)
    out = jnp.einsum("BKGTS,BSKc->BKGTc", (weights / safe[..., None]).astype(v.dtype), v)
    lse = jnp.where(seen, jnp.log(safe) + top[..., 0], -jnp.inf)
    return ungroup_heads(out).astype(q.dtype), ungroup_heads(lse)
