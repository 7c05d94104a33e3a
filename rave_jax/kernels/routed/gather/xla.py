"""Chosen regions in plain XLA: whole regions are taken out of the cache, and attention is over those.

Where query heads choose apart, the regions are those that some head of the group chose, and each head has a mask. They
are taken tile by tile, as many tiles as there are regions: a number known at run time only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rave_jax.kernels.routed.gather.base import (
    Operands,
    combined,
    finished,
    key_products,
    listed,
    nothing,
    open_entries,
    softmax_over,
    union,
    with_terms,
)
from rave_jax.typing import Array, Float, Int

TILE = 1024
"""About how many keys of a kv head are taken at a time, so that they are still in a processor's cache when read."""


def attention(operands: Operands, most: int, scale: float) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Attention over gathered regions; see `api.gather_attention`."""
    chosen = operands.chosen
    (B, K, G, _), N = operands.q.shape, chosen.shape[2]
    R, m, c = operands.v.shape[2:]
    most = min(R, N * most)
    # Tiles of one size: the last is not to be nearly empty.
    tiles = -(-most * m // TILE)
    tile = -(-most // tiles)
    index, count = listed(union(chosen), tiles * tile)
    # `most` is what a full cache may need; a short prompt chooses few of its regions, and heads often the same ones.
    needed = -(-jnp.max(count) // tile)

    def visit(n: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        here = jax.lax.dynamic_slice_in_dim(index, n * tile, tile, axis=2)
        return combined(sums, _over(operands, here, count - n * tile, scale))

    return finished(*jax.lax.fori_loop(0, needed, visit, nothing(B, K, G, c)))


def _over(
    operands: Operands, index: Int[Array, "B K n"], count: Int[Array, "B K"], scale: float
) -> tuple[Array, Array, Array]:
    """`softmax_over` of the first `count` of the listed regions."""
    k, v = (x.regions(index, count, operands.q.dtype) for x in (operands.k, operands.v))
    scores = with_terms(scale * key_products(k, operands.q), operands.terms, index)
    return softmax_over(scores, open_entries(operands, index, count), v)
