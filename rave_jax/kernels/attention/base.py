"""What the operation means: masks as five vectors, score terms, and the score of one (query, key) tile.

    dot_ij   = scale * <q_i, k_j>
    score_ij = dot_ij + sum of bias_ij of all terms + key_bias_j
    bias_ij  = f(dot_ij, <u_i, w_j>, features of i, features of j, numbers of the head)   where query i and key j are
               switched on, else 0; every term sees the same dot (`score`)
    allow_ij = (lo_i <= order_j <= hi_i) or (open_q_i == open_k_j)
    out_i    = sum_j softmax_j(score_ij over allowed j) v_j,   lse_i = log sum_j exp(score_ij)

Rows with no allowed key give out = 0 and lse = -inf, with finite gradients. With key groups, out and lse exist once
for each key group, as if its keys were all there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention.score import Term, Tile, function_of
from rave_jax.typing import Array, Bool, Float, Int

Implementation = Literal["auto", "reference", "xla", "pallas_tpu"]
NOWHERE = jnp.iinfo(jnp.int32).min
"""Order of keys that no interval reaches."""


class MaskCodes(NamedTuple):
    """Who may see whom, as data. Rules that hide keys narrow [lo, hi]; one rule may own the opening (-1 and -2 open
    nothing). The least and the largest int32 are no openings."""

    lo: Int[Array, "B T"]
    hi: Int[Array, "B T"]
    order: Int[Array, "B S"]
    open_q: Int[Array, "B T"]
    open_k: Int[Array, "B S"]


class KeyGroups(NamedTuple):
    """A partition of the keys: key j is in group `of[j]`, one of 0 .. count - 1; any other number is in none."""

    of: Int[Array, "B S"]
    count: int


class Terms(NamedTuple):
    """What is added to scale * <q, k> before the softmax: the terms' biases, and a number for each key and head (None
    adds nothing)."""

    parts: tuple[Term, ...] = ()
    per_key: Float[Array, "B S H"] | None = None

    def __bool__(self) -> bool:
        return bool(self.parts) or self.per_key is not None

    def map_queries(self, change: Callable[[Array], Array]) -> Terms:
        """The same with every array that belongs to queries changed."""
        return self._replace(parts=tuple(part.map_queries(change) for part in self.parts))

    def map_keys(self, change: Callable[[Array], Array]) -> Terms:
        """The same with every array that belongs to keys changed."""
        parts = tuple(part.map_keys(change) for part in self.parts)
        return Terms(parts, None if self.per_key is None else change(self.per_key))

    def of_queries(self) -> tuple[dict[str, Any], ...]:
        """What belongs to queries, of each term."""
        return tuple(part.of_queries() for part in self.parts)

    def with_queries(self, mine: tuple[dict[str, Any], ...]) -> Terms:
        """The same of other queries."""
        return self._replace(parts=tuple(part.replace(**own) for part, own in zip(self.parts, mine, strict=True)))


def group_heads(x: Float[Array, "B T H *rest"], num_kv_heads: int) -> Float[Array, "B K G T *rest"]:
    """Query heads beside the kv head they read: head n belongs to kv head n // G."""
    B, T, H, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, T, num_kv_heads, H // num_kv_heads, *rest), 1, 3)


def ungroup_heads(x: Float[Array, "B K G T *rest"]) -> Float[Array, "B T H *rest"]:
    """The inverse of `group_heads`."""
    B, K, G, T, *rest = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(B, T, K * G, *rest)


def tile_bias(term: Term, dot: Float[Array, "B K G T S"], num_kv_heads: int) -> Float[Array, "B K G T S"]:
    """The bias of every pair of a term's queries and keys."""
    function, K = function_of(term.function), num_kv_heads
    bias = function(tile_of(term, dot, K))
    on = tile_on(term, K)
    return jnp.broadcast_to(bias if on is None else jnp.where(on, bias, 0.0), dot.shape)


def tile_of(term: Term, dot: Float[Array, "B K G T S"], num_kv_heads: int) -> Tile:
    """What a term's function reads of all its pairs."""
    K, pair = num_kv_heads, None
    if term.u is not None:
        u = group_heads(term.u, K)
        pair = jnp.einsum("BKGTr,BSKr->BKGTS", u, term.w, precision=jax.lax.Precision.HIGHEST)
        pair = pair + function_of(term.function).OFFSET
    return Tile(
        dot,
        pair,
        {name: group_heads(x, K)[..., None] for name, x in term.query.items()},
        {name: jnp.moveaxis(x, 1, 2)[:, :, None, None] for name, x in term.key.items()},
        {name: x.reshape(1, K, -1, 1, 1) for name, x in term.head.items()},
    )


def tile_on(term: Term, num_kv_heads: int) -> Bool[Array, "#B #K #G #T #S"] | None:
    """Which pairs a term adds to; None is all."""
    query = None if term.query_on is None else group_heads(term.query_on, num_kv_heads)[..., None]
    key = None if term.key_on is None else term.key_on[:, None, None, None, :]
    return query & key if query is not None and key is not None else query if key is None else key


def tile_scores(
    q: Float[Array, "B K G T h"], k: Float[Array, "B S K h"], terms: Terms, scale: float
) -> Float[Array, "B K G T S"]:
    """Float32 scores of every pair, before the mask."""
    dot = scale * jnp.einsum("BKGTh,BSKh->BKGTS", q, k, preferred_element_type=jnp.float32)
    (B, S, K), scores = k.shape[:3], dot
    for term in terms.parts:
        scores = scores + tile_bias(term, dot, K)
    if terms.per_key is not None:
        scores = scores + jnp.moveaxis(terms.per_key, 1, 2).reshape(B, K, -1, 1, S)
    return scores


def tile_allow(codes: MaskCodes) -> Bool[Array, "B 1 1 T S"]:
    """The one mask predicate."""
    order, open_k = codes.order[:, None, :], codes.open_k[:, None, :]
    inside = (codes.lo[..., None] <= order) & (order <= codes.hi[..., None])
    return (inside | (codes.open_q[..., None] == open_k))[:, None, None]


def of_key_group(codes: MaskCodes, key_groups: KeyGroups, number: int) -> MaskCodes:
    """The same codes with the keys of all other key groups out of reach."""
    inside = key_groups.of == number
    # An opening needs a number that no query has: the largest and one more (of -1, none, that is still no key's).
    shut = jnp.max(codes.open_q, axis=1, keepdims=True) + 1
    return codes._replace(order=jnp.where(inside, codes.order, NOWHERE), open_k=jnp.where(inside, codes.open_k, shut))
