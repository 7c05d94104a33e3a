"""Rows of the attention map on demand: exact weights of chosen queries from the saved log-sum-exp, O(N S)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import KeyFactor
from rave_jax.attention.scores import Scores, map_queries, of_queries, pick
from rave_jax.kernels.attention import KeyGroups
from rave_jax.kernels.attention.base import group_heads
from rave_jax.kernels.routed import Choice, Routing, choice_of, of_keys, open_keys
from rave_jax.typing import Array, Bool, Float, Int

BLOCK = 512
"""Queries whose choice is made at once."""


class QueryChoice(NamedTuple):
    """What some queries chose, and the region of every key [B,S]."""

    choice: Choice
    keys: Int[Array, "B S"]


def attention_of(
    scores: Scores,
    lse: Float[Array, "B T H"],
    queries: Int[Array, "B N"],
    factor: KeyFactor | None = None,
    groups: KeyGroups | None = None,
    weights: Float[Array, "B T M H"] | None = None,
    asked: QueryChoice | None = None,
) -> Float[Array, "B N H S"]:
    """Attention weights of some queries over all keys, float32; a row that may see nothing is zero.

    Args:
        scores: of all pairs.
        lse: of the weights that are asked for, after whatever changed them.
        queries: which, by index.
        factor: the key of each query whose weight was multiplied, or None.
        groups, weights: log factors of M key groups, or None.
        asked: what these queries chose, or None where nothing routes.
    """
    found, allowed = of_queries(scores, queries)
    if asked is not None:
        choice, keys = asked
        allowed = allowed & _by_head(open_keys(choice, keys), found.shape)
        if choice.bias is not None:
            found = found + _by_head(of_keys(choice.bias, keys, fill=0.0), found.shape)
    if factor is not None:
        at_key = pick(factor.key, queries)[..., None] == jnp.arange(found.shape[-1])
        found = found + at_key[:, :, None] * factor.log[:, None]
    if weights is not None and groups is not None:
        of_key = jnp.broadcast_to(groups.of[:, None, None], found.shape)
        found = found + jnp.take_along_axis(jnp.moveaxis(pick(weights, queries), 2, 3), of_key, axis=-1, mode="clip")
    norm = pick(lse, queries)[..., None]
    return jnp.where(allowed, jnp.exp(found - jnp.where(norm == -jnp.inf, 0.0, norm)), 0.0)


def choice_of_queries(scores: Scores, queries: Int[Array, "B N"], routing: Routing) -> QueryChoice:
    """The choice of some queries, by index."""
    routes, rule, _ = routing
    mine = routes.with_queries(jax.tree.map(lambda x: pick(x, queries), routes.queries()))
    codes = map_queries(scores.codes, queries)
    found = None
    if rule.reads_scores:
        found = group_heads(of_queries(scores, queries)[0], scores.k.shape[2])
    return QueryChoice(choice_of(found, codes, mine, rule, scores.scale), routes.keys)


def at_key(
    scores: Scores, key: Int[Array, "B T"], routing: Routing
) -> tuple[Bool[Array, "B T H"], Float[Array, "B T H"] | None]:
    """Of all T queries and one key of each: is its region open to them, and what is added to its score? The choice is
    made again, in blocks of queries."""
    B, T, H, _ = scores.q.shape
    size = min(BLOCK, T)

    def block(start: Int[Array, ""]) -> tuple[Array, Array | None]:
        queries = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), T - 1)
        queries = jnp.broadcast_to(queries, (B, size))
        return _at_key(choice_of_queries(scores, queries, routing), pick(key, queries), H)

    starts = jnp.arange(0, T, size, dtype=jnp.int32)
    found = jax.lax.map(jax.checkpoint(block), starts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, H)[:, :T], found)


def _at_key(
    asked: QueryChoice, key: Int[Array, "B N"], num_heads: int
) -> tuple[Bool[Array, "B N H"], Float[Array, "B N H"] | None]:
    choice, keys = asked
    region = pick(keys, key)[:, None, None, :, None]

    def of_region(x: Array) -> Array:
        x = jnp.broadcast_to(x, (*choice.chosen.shape[:4], x.shape[-1]))
        found = jnp.take_along_axis(x, jnp.maximum(region - 1, 0), axis=-1, mode="clip")
        return _by_head(found, (*key.shape, num_heads, 1))[..., 0]

    beside = (pick(keys, key) == 0)[..., None]
    open_ = beside | of_region(choice.chosen | ~choice.candidate)
    return open_, None if choice.bias is None else jnp.where(beside, 0.0, of_region(choice.bias))


def chosen_regions(asked: QueryChoice, num_heads: int) -> Bool[Array, "B N H R"]:
    """Which regions the queries chose, for each of H heads."""
    B, _, _, N, R = asked.choice.chosen.shape
    return _by_head(asked.choice.chosen, (B, N, num_heads, R))


def _by_head(x: Array, shape: tuple[int, ...]) -> Array:
    """x [B,K,G or 1,N,S] as [B,N,H,S]."""
    B, N, H, S = shape
    K = x.shape[1]
    return jnp.moveaxis(jnp.broadcast_to(x, (B, K, H // K, N, S)), 3, 1).reshape(B, N, H, S)
