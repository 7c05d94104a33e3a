"""Mask codes of the plain rules. Other rules intersect or open these; the predicate is in kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rave_jax.batch import TokenInfo
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.attention.base import NOWHERE
from rave_jax.typing import Array, Float, Int

NO_OPEN_Q, NO_OPEN_K = -1, -2


def codes_from_bounds(lo: Int[Array, "B T"], hi: Int[Array, "B T"], order: Int[Array, "B S"]) -> MaskCodes:
    """Codes that allow lo <= order <= hi and open nothing."""
    return MaskCodes(lo, hi, order, jnp.full_like(lo, NO_OPEN_Q), jnp.full_like(order, NO_OPEN_K))


def document_starts(document: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """First index of each token's run of equal document numbers."""
    index = jnp.arange(document.shape[1], dtype=jnp.int32)
    first = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def order_in_row(info: TokenInfo) -> Int[Array, "B T"]:
    """Where each token would lie if every document's tokens lay in their places: a permutation of the row. Padding
    stays where it lies."""
    index = jnp.arange(info.document.shape[1], dtype=jnp.int32)
    return jnp.where(info.document > 0, document_starts(info.document) + info.offset, index)


def by_order(x: Int[Array, "B S"], order: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """x of every token at the place that `order` says; 0 where no token has the place. A negative order has none."""
    S = x.shape[1]
    at = jnp.where(order >= 0, order, S)
    return jax.vmap(lambda row, at: jnp.zeros_like(row).at[at].set(row, mode="drop"))(x, at)


def causal_codes(info: TokenInfo) -> MaskCodes:
    """Each token sees the tokens of its own document up to itself; padding (document 0) sees and is seen by none.

    Documents are contiguous runs of one number; `place` says where in its document a token stands, whatever the
    order that the document's tokens lie in.
    """
    order = order_in_row(info)
    return codes_from_bounds(jnp.where(info.document > 0, document_starts(info.document), order + 1), order, order)


def block_diagonal_codes(block: Int[Array, "B P"]) -> MaskCodes:
    """Each element sees all elements with its own block number; padding (0) sees none.

    Blocks are the frames or windows of the vision tower."""
    return codes_from_bounds(jnp.where(block > 0, block, 1), block, block)


def cached_codes(info: TokenInfo, held: TokenInfo) -> MaskCodes:
    """Queries of rows whose entries hold one document each: they see its tokens up to their own place, and padding
    (document 0) sees none.

    Args:
        info: of the queries [B,T].
        held: of the entries [B,S]; document 0 where an entry holds nothing.
    """
    lo = jnp.where(info.document > 0, 0, info.offset + 1)
    return codes_from_bounds(lo, info.offset, jnp.where(held.document > 0, held.offset, NOWHERE))


def sums_by_document(values: Float[Array, "B T *rest"], document: Int[Array, "B T"]) -> Float[Array, "B N *rest"]:
    """Sums over the tokens of each document, by its number; N is as many as a row can hold, and 0 is padding."""
    most = document.shape[1] + 1
    return jax.vmap(lambda x, number: jax.ops.segment_sum(x, number, num_segments=most))(values, document)
