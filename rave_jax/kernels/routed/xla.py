"""Routed attention in plain XLA: block after block of queries, each against all keys.

Memory is O(T): one block's scores live at a time, forward and backward, and the choice of its regions with them. It
computes every score, chosen or not: what routing saves is saved where regions are gathered (decoding) or skipped
(the fused kernels).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.kernels import support
from rave_jax.kernels.attention.base import (
    NOWHERE,
    MaskCodes,
    Terms,
    group_heads,
    tile_allow,
    tile_scores,
    ungroup_heads,
)
from rave_jax.kernels.routed.base import (
    Choice,
    RouteRule,
    Routes,
    Routing,
    candidates,
    choose,
    of_keys,
    open_keys,
    region_masses,
    region_scores,
    span_bias,
)
from rave_jax.parallel.sharding import current_mesh, named_sharding
from rave_jax.typing import Array, Float

MOST_SCORES = 1 << 23
"""Scores of one block of queries, all heads and rows of a device together."""


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Terms,
    scale: float,
    routing: Routing,
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """Blocks of queries; see `api.attention`."""
    routes = routing.routes

    def of_block(mine: tuple[Any, ...]) -> tuple[Array, Array]:
        q, codes_q, terms_q, routes_q = mine
        block_codes = codes._replace(**codes_q)
        block_terms = terms.with_queries(terms_q)
        block_routing = routing._replace(routes=routes.with_queries(routes_q))
        return whole(q, k, v, block_codes, block_terms, scale, block_routing)

    mine = (
        q,
        {name: getattr(codes, name) for name in ("lo", "hi", "open_q")},
        terms.of_queries(),
        routes.queries(),
    )
    (B, T, H, _), S = q.shape, k.shape[1]
    block = max(8, MOST_SCORES // (_maps(B, H) * S) // 8 * 8)
    if block >= T:
        # A map that is one tile may be kept for the backward pass; a larger one is made again there.
        return of_block(mine) if T * S <= support.SMALL else jax.checkpoint(of_block)(mine)
    # Rows that are filled up see nothing: their interval is empty, and they have no opening.
    fill = {"lo": 1, "hi": 0, "open_q": -1}
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, -T % block)] + [(0, 0)] * (x.ndim - 2)), mine)
    padded[1].update({n: jnp.pad(x, [(0, 0), (0, -T % block)], constant_values=fill[n]) for n, x in mine[1].items()})
    blocks = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0), padded)
    found = jax.lax.map(jax.checkpoint(of_block, prevent_cse=False), blocks)
    out, lse = (jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for x in found)
    return out, lse


def _maps(B: int, H: int) -> int:
    """Maps of all pairs that one device makes at once: a mesh splits rows and heads, unless they are split already."""
    mesh = None if jax.sharding.get_abstract_mesh().manual_axes else current_mesh()
    shape = (B, H) if mesh is None else named_sharding(("batch", "heads"), (B, H), mesh).shard_shape((B, H))
    return math.prod(shape)


def whole(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Terms,
    scale: float,
    routing: Routing,
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """All queries at once; makes arrays [B,H,T,S]."""
    routes, K = routing.routes, k.shape[2]
    scores = tile_scores(group_heads(q, K), k, terms, scale)
    allow = tile_allow(codes)
    choice = choice_of(scores, codes, routes, routing.rule, scale)
    allow = allow & open_keys(choice, routes.keys)
    if choice.bias is not None:
        scores = scores + of_keys(choice.bias, routes.keys, fill=0.0)
    scores = jnp.where(allow, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min))
    weights = jnp.where(allow, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1)
    seen = total != 0  # NaN counts as seen, and stays
    safe = jnp.where(seen, total, 1.0)
    out = jnp.einsum("BKGTS,BSKc->BKGTc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    lse = jnp.where(seen, jnp.log(safe) + top[..., 0], -jnp.inf)
    return ungroup_heads(out / safe[..., None]).astype(q.dtype), ungroup_heads(lse)


def choice_of(
    scores: Float[Array, "B K G T S"] | None,
    codes: MaskCodes,
    routes: Routes,
    rule: RouteRule,
    scale: float,
) -> Choice:
    """Every query's choice; `scores` are of its keys, and are read where `rule.reads_scores`. Biases are added to
    `scale` <q, k>."""
    if rule.by == "mass":
        assert scores is not None
        ranks = region_masses(scores, routes)
    else:
        ranks = region_scores(routes, scale)
    choice = choose(ranks, candidates(codes, routes), routes.dense, rule)
    if rule.choice != "spans":
        return choice
    assert scores is not None
    masses = region_masses(jnp.where(tile_allow(codes), scores, -jnp.inf), routes)
    routed = (routes.before > NOWHERE)[:, None, None, :, None]
    return choice._replace(bias=jnp.where(routed, span_bias(ranks, masses, choice), 0.0))
