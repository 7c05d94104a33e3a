"""Mask codes of the plain rules. Other rules intersect or open these; the predicate is in kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rave_jax.batch import TokenInfo
from rave_jax.kernels.pair_bias import MaskCodes
from rave_jax.kernels.pair_bias.base import NOWHERE
from rave_jax.typing import Array, Int

NO_OPEN_Q, NO_OPEN_K = -1, -2


def codes_from_bounds(lo: Int[Array, "B T"], hi: Int[Array, "B T"], order: Int[Array, "B S"]) -> MaskCodes:
    """Codes that allow lo <= order <= hi and open nothing."""
    return MaskCodes(lo, hi, order, jnp.full_like(lo, NO_OPEN_Q), jnp.full_like(order, NO_OPEN_K))


def document_starts(segment: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """First index of each token's run of equal segment numbers."""
    index = jnp.arange(segment.shape[1], dtype=jnp.int32)
    first = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def order_in_row(info: TokenInfo) -> Int[Array, "B T"]:
    """Where each token would lie if every document's tokens lay in their places: a permutation of the row. Padding
    stays where it lies."""
    index = jnp.arange(info.segment.shape[1], dtype=jnp.int32)
    return jnp.where(info.segment > 0, document_starts(info.segment) + info.place, index)


def causal_codes(info: TokenInfo) -> MaskCodes:
    """Each token sees the tokens of its own document up to itself; padding (segment 0) sees and is seen by none.

    Documents are contiguous runs of one segment number; `place` says where in its document a token stands, whatever the
    order that the document's tokens lie in.
    """
    order = order_in_row(info)
    return codes_from_bounds(jnp.where(info.segment > 0, document_starts(info.segment), order + 1), order, order)


def segment_codes(segment: Int[Array, "B P"]) -> MaskCodes:
    """Each element sees all elements with its own segment number (vision tower); padding (0) sees none."""
    return codes_from_bounds(jnp.where(segment > 0, segment, 1), segment, segment)


def cached_codes(info: TokenInfo, held: TokenInfo) -> MaskCodes:
    """Queries of rows whose slots hold one document each: they see its tokens up to their own place, and padding
    (segment 0) sees none.

    Args:
        info: of the queries [B,T].
        held: of the slots [B,S]; segment 0 where a slot holds nothing.
    """
    lo = jnp.where(info.segment > 0, 0, info.place + 1)
    return codes_from_bounds(lo, info.place, jnp.where(held.segment > 0, held.place, NOWHERE))
