"""One query against the regions that it chose, from keys that are kept region by region."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rave_jax.kernels.pair_bias.base import PairForm
from rave_jax.typing import Array, Bool, Float


class RegionBias(NamedTuple):
    """Operands of the pair bias (`pair_bias.PairBias`) of one query and of keys by region."""

    u: Float[Array, "B H r"]
    w: Float[Array, "B K R m r"]
    row: Float[Array, "B H"]
    key: Float[Array, "B K R m"]
    gain: Float[Array, "H"]
    query_on: Bool[Array, "B H"]


def gather_attention(
    q: Float[Array, "B H h"],
    k: Float[Array, "B K R m h"],
    v: Float[Array, "B K R m c"],
    real: Bool[Array, "B R m"],
    chosen: Bool[Array, "B K N R"],
    most: int,
    bias: RegionBias | None,
    form: PairForm,
    *,
    scale: float,
) -> tuple[Float[Array, "B H c"], Float[Array, "B H"]]:
    """Attention over the chosen regions alone.

    Args:
        q: one query of each row.
        k, v: of all regions.
        real: slots that hold a key.
        chosen: of each query head (N = G) or kv group (N = 1).
        most: regions that one of them chooses at most.
        bias: operands of the pair bias, or None.
        form: how the bias grows from them.
        scale: multiplies <q, k>.

    Returns:
        (output in q's dtype, float32 log-sum-exp); 0 and -inf where nothing is chosen.
    """
    (B, H, h), K = q.shape, k.shape[1]
    G = H // K
    scores = scale * jnp.einsum("BKGh,BKRmh->BKGRm", q.reshape(B, K, G, h), k, preferred_element_type=jnp.float32)
    if bias is not None:
        z = jnp.einsum("BKGr,BKRmr->BKGRm", bias.u.reshape(B, K, G, -1), bias.w)
        z = z + bias.row.reshape(B, K, G, 1, 1) + bias.key[:, :, None]
        added = form(z, bias.gain.reshape(1, K, G, 1, 1))
        scores = scores + jnp.where(bias.query_on.reshape(B, K, G, 1, 1), added, 0.0)
    open_ = real[:, None, None] & chosen[..., None]
    scores = jnp.where(open_, scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=(-1, -2), keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.where(open_, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=(-1, -2))
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("BKGRm,BKRmc->BKGc", weights.astype(v.dtype), v) / safe[..., None]
    lse = jnp.where(total > 0, jnp.log(safe) + top[..., 0, 0], -jnp.inf)
    return out.reshape(B, H, -1).astype(q.dtype), lse.reshape(B, H)
