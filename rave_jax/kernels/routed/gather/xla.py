"""Chosen regions in plain XLA: whole regions are taken out of the cache, and attention is over those.

With one choice for each kv head the regions are taken at once. With a choice for each query head, those that some
head of the group chose are taken tile by tile, as many tiles as there are regions: a number known at run time only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rave_jax.kernels.pair_bias import PairForm
from rave_jax.kernels.routed.gather.base import (
    Operands,
    combined,
    finished,
    listed,
    nothing,
    softmax_over,
    tile_scores,
    union,
)
from rave_jax.typing import Array, Float, Int

TILE = 512
"""About how many keys are taken at a time where heads choose apart."""


def attention(
    operands: Operands, most: int, form: PairForm, scale: float
) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Attention over gathered regions; see `api.gather_attention`."""
    chosen = operands.chosen
    (B, K, G, _), N = operands.q.shape, chosen.shape[2]
    R, m, c = operands.v.shape[2:]
    if N == 1:
        index, count = listed(chosen[:, :, 0], most)
        return finished(*_over(operands, index, jnp.arange(most) < count[..., None], form, scale))
    tile = min(R, max(1, TILE // m))
    tiles = -(-min(R, N * most) // tile)
    index, count = listed(union(chosen), tiles * tile)
    needed = -(-jnp.max(count) // tile)

    def visit(n: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        here = jax.lax.dynamic_slice_in_dim(index, n * tile, tile, axis=2)
        live = n * tile + jnp.arange(tile) < count[..., None]
        return combined(sums, _over(operands, here, live, form, scale))

    return finished(*jax.lax.fori_loop(0, needed, visit, nothing(B, K, G, c)))


def _over(
    operands: Operands, index: Int[Array, "B K n"], live: Array, form: PairForm, scale: float
) -> tuple[Array, Array, Array]:
    """`softmax_over` of the listed regions, those that are live."""
    q, k, v, real, chosen, bias = operands
    B, K, n = index.shape
    keys = n * k.shape[3]

    def slots(x: Array) -> Array:
        """Of x [B,K,R,m,...] the listed regions' slots [B,K,n*m,...]."""
        return _taken(x, index).reshape(B, K, keys, *x.shape[4:])

    mine = jax.vmap(lambda rows, at: rows[at])(real, index) & live[..., None]
    open_ = mine.reshape(B, K, keys, 1)
    if chosen.shape[2] > 1:
        heads = jnp.take_along_axis(jnp.swapaxes(chosen, 2, 3), index[..., None], axis=2)
        open_ = (mine[..., None] & heads[:, :, :, None]).reshape(B, K, keys, -1)
    if bias is not None:
        bias = bias._replace(w=slots(bias.w), key=slots(bias.key))
    return softmax_over(tile_scores(q, slots(k), bias, form, scale), open_, slots(v))


def _taken(x: Float[Array, "B K R *rest"], index: Int[Array, "B K n"]) -> Float[Array, "B K n *rest"]:
    """Whole regions of each row and kv head."""
    return jax.vmap(jax.vmap(lambda regions, at: regions.at[at].get(mode="promise_in_bounds")))(x, index)
