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
    bias_of,
    combined,
    finished,
    listed,
    nothing,
    open_slots,
    softmax_over,
    taken,
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
        return finished(*_over(operands, index, count, form, scale))
    tile = min(R, max(1, TILE // m))
    tiles = -(-min(R, N * most) // tile)
    index, count = listed(union(chosen), tiles * tile)
    needed = -(-jnp.max(count) // tile)

    def visit(n: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        here = jax.lax.dynamic_slice_in_dim(index, n * tile, tile, axis=2)
        return combined(sums, _over(operands, here, count - n * tile, form, scale))

    return finished(*jax.lax.fori_loop(0, needed, visit, nothing(B, K, G, c)))


def _over(
    operands: Operands, index: Int[Array, "B K n"], count: Int[Array, "B K"], form: PairForm, scale: float
) -> tuple[Array, Array, Array]:
    """`softmax_over` of the first `count` of the listed regions."""
    k, v = taken(operands.k, index), taken(operands.v, index)
    # The keys stand on the left: the products of few queries the other way round make a copy of the keys first.
    scores = scale * jnp.einsum("BKSh,BKGh->BKSG", k, operands.q, preferred_element_type=jnp.float32)
    if operands.bias is not None:
        scores = scores + bias_of(operands.bias, index, form)
    return softmax_over(scores, open_slots(operands, index, count), v)
