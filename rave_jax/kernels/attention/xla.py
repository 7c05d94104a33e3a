"""Blockwise attention in plain XLA: a scan over key blocks with an online softmax, forward and backward.

Memory is O(T): only one [T, block] tile of scores lives at a time, the backward pass recomputes it from the
log-sum-exp. Runs on any device. The gradient is the usual one of flash attention with one more term, because
the log-sum-exp is an output too:

    dS = P * (dO v^T - rowsum(dO * O) + dlse)

dS is the cotangent of every term's bias: the vjp of its function, traced into the tile, gives those of its operands,
and that of the pair product becomes those of u and w by two more products.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.kernels import saved
from rave_jax.kernels.attention.base import NOWHERE, MaskCodes, Terms, group_heads, tile_allow, ungroup_heads
from rave_jax.kernels.attention.score import ScoreFunction, Shape, Slopes, Term, Tile, function_of, reads_dot
from rave_jax.kernels.attention.slopes import bias_and_pull, reciprocal
from rave_jax.typing import Array, Bool, Float


class QueryPart(NamedTuple):
    """A term's floats that do not belong to keys, as the scan reads them; zeros in `pair` are switches of functions
    that are 0 there."""

    pair: Float[Array, "B K G T r"] | None
    query: dict[str, Float[Array, "B K G T 1"]]
    head: dict[str, Float[Array, "K G 1 1"]]


class KeyPart(NamedTuple):
    """A term's floats that belong to keys."""

    pair: Float[Array, "B S K r"] | None
    key: dict[str, Float[Array, "B S K"]]


class Added(NamedTuple):
    """What is added to scale * <q, k>: the floats, which have gradients."""

    queries: tuple[QueryPart, ...]
    keys: tuple[KeyPart, ...]
    per_key: Float[Array, "B S K G"] | None


class OfKeys(NamedTuple):
    """What has no gradient and belongs to keys: mask codes, and a term's switches (None: on, or zeros in `pair`)."""

    order: Array
    open_k: Array
    on: tuple[Bool[Array, "B S"] | None, ...]


class OfQueries(NamedTuple):
    """What has no gradient and belongs to queries."""

    lo: Array
    hi: Array
    open_q: Array
    on: tuple[Bool[Array, "B K G T 1"] | None, ...]


class Static(NamedTuple):
    """What the program is compiled for; of each term its function, and whether it reads dot."""

    functions: tuple[tuple[ScoreFunction, bool], ...]
    scale: float
    block: int


def block_size(T: int, S: int) -> int:
    """Keys per block: all of them where the whole map is no larger than a tile (windows, decoding), else wide enough to
    keep the matrix units busy, about 2^22 scores per head or 128 keys, and never all of a long S."""
    if S <= 128 or T * S <= 1 << 14:
        return S
    widest = max(128, min(512, (1 << 22) // max(T, 1) // 128 * 128))
    return min(widest, max(128, S // 8 // 128 * 128))


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K c"],
    codes: MaskCodes,
    terms: Terms,
    scale: float,
) -> tuple[Float[Array, "B T H c"], Float[Array, "B T H"]]:
    """Blockwise attention; see `api.attention`."""
    (T, S), K = (q.shape[1], k.shape[1]), k.shape[2]
    block = block_size(T, S)
    functions = tuple((function, reads_dot(function, Shape.of(term))) for function, term in _functions(terms))
    switches = tuple(_switches(term, K) for term in terms.parts)
    of_queries = OfQueries(codes.lo, codes.hi, codes.open_q, tuple(on for on, _ in switches))
    of_keys = OfKeys(codes.order, codes.open_k, tuple(on for _, on in switches))
    added = _added(terms, K)
    padding = -S % block
    if padding:
        k, v = _pad(k, padding), _pad(v, padding)
        of_keys = OfKeys(
            _pad(of_keys.order, padding, NOWHERE),
            _pad(of_keys.open_k, padding, NOWHERE),
            jax.tree.map(lambda x: _pad(x, padding), of_keys.on),
        )
        keys, per_key = jax.tree.map(lambda x: _pad(x, padding), (added.keys, added.per_key))
        added = added._replace(keys=keys, per_key=per_key)
    return _attention(q, k, v, added, of_queries, of_keys, Static(functions, scale, block))


def _pad(x: Array, count: int, value: int = 0) -> Array:
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _functions(terms: Terms) -> list[tuple[ScoreFunction, Term]]:
    return [(function_of(term.function), term) for term in terms.parts]


def _switches(term: Term, K: int) -> tuple[Array | None, Array | None]:
    """Switches of queries and keys that a tile has to read."""
    if function_of(term.function).ZERO_OFF:
        return None, None
    return None if term.query_on is None else group_heads(term.query_on, K)[..., None], term.key_on


def _added(terms: Terms, K: int) -> Added:
    """Plain jnp: jax differentiates it, switches included."""
    queries, keys = [], []
    for function, term in _functions(terms):
        u, w = term.u, term.w
        if function.ZERO_OFF and u is not None and w is not None:
            u = u if term.query_on is None else jnp.where(term.query_on[..., None], u, 0.0)
            w = w if term.key_on is None else jnp.where(term.key_on[..., None, None], w, 0.0)
        query = {name: group_heads(x, K)[..., None] for name, x in term.query.items()}
        head = {name: x.reshape(K, -1, 1, 1) for name, x in term.head.items()}
        queries.append(QueryPart(None if u is None else group_heads(u, K), query, head))
        keys.append(KeyPart(w, dict(term.key)))
    per_key = terms.per_key
    if per_key is not None:
        per_key = per_key.reshape(*per_key.shape[:2], K, -1)
    return Added(tuple(queries), tuple(keys), per_key)


def _product(form: str, a: Array, b: Array) -> Array:
    """In full float32: it may carry large terms of a query or a key, and has few channels."""
    return jnp.einsum(form, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _tile(function: ScoreFunction, mine: QueryPart, of_keys: KeyPart, dot: Array) -> Tile:
    pair = None
    if mine.pair is not None and of_keys.pair is not None:
        pair = _product("BKGTr,BSKr->BKGTS", mine.pair, of_keys.pair) + function.OFFSET
    key = {name: jnp.moveaxis(x, 1, 2)[:, :, None, None] for name, x in of_keys.key.items()}
    return Tile(dot, pair, mine.query, key, {name: x[None] for name, x in mine.head.items()})


def _on(query: Array | None, key: Array | None) -> Array | None:
    """Where a term adds something in a tile; None is everywhere."""
    key = None if key is None else key[:, None, None, None]
    return query & key if query is not None and key is not None else key if query is None else query


def _factored(static: Static) -> int | None:
    """The one term whose exponential may multiply the weights: it is no part of a row's maximum, and lies between
    e^LEAST and e^MOST, so no row loses its weight by it. Of two that would not hold."""
    bounded = [n for n, (function, _) in enumerate(static.functions) if function.bounded]
    return bounded[0] if bounded else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, added, of_queries, of_keys, static):
    return _forward(q, k, v, added, of_queries, of_keys, static)[0]


def _dots(q, k, scale: float):
    return scale * jnp.einsum("BKGTh,BSKh->BKGTS", q, k, preferred_element_type=jnp.float32)


def _with_per_key(scores, per_key):
    return scores if per_key is None else scores + jnp.moveaxis(per_key, 1, 3)[:, :, :, None]


def _allowed(of_queries: OfQueries, of_keys: OfKeys):
    return tile_allow(MaskCodes(of_queries.lo, of_queries.hi, of_keys.order, of_queries.open_q, of_keys.open_k))


def _forward(q, k, v, added: Added, of_queries: OfQueries, of_keys: OfKeys, static: Static):
    K = k.shape[2]
    qg = group_heads(q, K)
    B, _, G, T, _ = qg.shape

    def visit(carry, start):
        out, top, total = carry
        k_tile, v_tile, added_tile, keys_tile = _take((k, v, added, of_keys), start, static.block)
        dot = _dots(qg, k_tile, static.scale)
        scores, factor = _with_per_key(dot, added_tile.per_key), None
        for n, (function, _) in enumerate(static.functions):
            tile = _tile(function, added.queries[n], added_tile.keys[n], dot)
            on = _on(of_queries.on[n], keys_tile.on[n])
            found = function.factored(tile, reciprocal) if n == _factored(static) else None
            if found is not None:
                factor = found[0] if on is None else jnp.where(on, found[0], 1.0)
            else:
                bias = function(tile)
                scores = scores + (bias if on is None else jnp.where(on, bias, 0.0))
        scores = jnp.where(_allowed(of_queries, keys_tile), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - anchor[..., None])
        weights = weights if factor is None else weights * factor
        shrink = jnp.exp(top - anchor)
        part = jnp.einsum("BKGTS,BSKc->BKGTc", weights.astype(v.dtype), v_tile, preferred_element_type=jnp.float32)
        return (out * shrink[..., None] + part, new_top, total * shrink + weights.sum(-1)), None

    start = (
        jnp.zeros((B, K, G, T, v.shape[-1]), jnp.float32),
        jnp.full((B, K, G, T), -jnp.inf, jnp.float32),
        jnp.zeros((B, K, G, T), jnp.float32),
    )
    out, top, total = _scan_blocks(visit, start, k.shape[1], static.block)[0]
    seen = total != 0  # NaN counts as seen, and stays
    out = out / jnp.where(seen, total, 1.0)[..., None]
    lse = jnp.where(seen, jnp.where(seen, top, 0.0) + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    out, lse = saved.of_attention(ungroup_heads(out).astype(q.dtype), ungroup_heads(lse))
    return (out, lse), (q, k, v, added, of_queries, of_keys, out, lse)


def _backward(static: Static, kept, cotangents):
    q, k, v, added, of_queries, of_keys, out, lse = kept
    d_out, d_lse = cotangents
    K = k.shape[2]
    qg, d_outg = group_heads(q, K), group_heads(d_out.astype(v.dtype), K)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    lse_g, shift = group_heads(lse, K)[..., None], group_heads(d_lse - delta, K)[..., None]

    def visit(d_rows, start):
        k_tile, v_tile, added_tile, keys_tile = _take((k, v, added, of_keys), start, static.block)
        dot = _dots(qg, k_tile, static.scale)
        scores, factor, pulls = _with_per_key(dot, added_tile.per_key), None, []
        for n, (function, reads) in enumerate(static.functions):
            tile = _tile(function, added.queries[n], added_tile.keys[n], dot)
            on = _on(of_queries.on[n], keys_tile.on[n])
            bias, times, pull = bias_and_pull(function, reads, tile, on, factored=n == _factored(static))
            scores, factor = scores if bias is None else scores + bias, times if times is not None else factor
            pulls.append(pull)
        weights = jnp.exp(scores - lse_g)
        if factor is not None:
            weights = weights * factor
        # Three products need the weights. Without the barrier XLA computes them again for each product. On a CPU this
        # makes a step with a gate slower, and leaves one without a gate as fast.
        weights = jax.lax.optimization_barrier(jnp.where(_allowed(of_queries, keys_tile), weights, 0.0))
        d_weights = jnp.einsum("BKGTc,BSKc->BKGTS", d_outg, v_tile, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights + shift)
        d_v = jnp.einsum("BKGTS,BKGTc->BSKc", weights.astype(v.dtype), d_outg, preferred_element_type=jnp.float32)
        d_queries, d_keys, d_dot = [], [], d_scores
        for pull, mine, of_key in zip(pulls, added.queries, added_tile.keys, strict=True):
            d_tile = pull(d_scores)
            d_mine, d_of_key = _pulled(d_tile, mine, of_key)
            d_queries.append(d_mine)
            d_keys.append(d_of_key)
            d_dot = d_dot if d_tile.dot is None else d_dot + d_tile.dot
        d_dot = (static.scale * d_dot).astype(q.dtype)
        d_q = jnp.einsum("BKGTS,BSKh->BKGTh", d_dot, k_tile, preferred_element_type=jnp.float32)
        d_k = jnp.einsum("BKGTS,BKGTh->BSKh", d_dot, qg, preferred_element_type=jnp.float32)
        d_per_key = None if added.per_key is None else jnp.moveaxis(d_scores.sum(3), 3, 1)
        d_rows = jax.tree.map(jnp.add, d_rows, (d_q, tuple(d_queries)))
        return d_rows, (d_k.astype(k.dtype), d_v.astype(v.dtype), tuple(d_keys), d_per_key)

    d_rows = jnp.zeros(qg.shape, jnp.float32), jax.tree.map(jnp.zeros_like, added.queries)
    (d_q, d_queries), d_of_keys = _scan_blocks(visit, d_rows, k.shape[1], static.block)
    d_k, d_v, d_keys, d_per_key = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), d_of_keys
    )
    return ungroup_heads(d_q).astype(q.dtype), d_k, d_v, Added(d_queries, d_keys, d_per_key), None, None


def _pulled(d_tile: Slopes, mine: QueryPart, of_keys: KeyPart) -> tuple[QueryPart, KeyPart]:
    """Cotangents of a term's operands from those of its tile."""
    d_u = d_w = None
    if mine.pair is not None and of_keys.pair is not None and d_tile.pair is not None:
        d_u = _product("BKGTS,BSKr->BKGTr", d_tile.pair, of_keys.pair)
        d_w = _product("BKGTS,BKGTr->BSKr", d_tile.pair, mine.pair)
    d_head = {name: x[0] for name, x in d_tile.head.items()}
    d_key = {name: jnp.moveaxis(x[:, :, 0, 0], 1, 2) for name, x in d_tile.key.items()}
    return QueryPart(d_u, d_tile.query, d_head), KeyPart(d_w, d_key)


def _take(operands, start, size: int):
    """The same operands for keys start .. start + size - 1; what belongs to queries as it is."""

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    k, v, added, of_keys = operands
    keys, per_key = jax.tree.map(cut, (added.keys, added.per_key))
    return cut(k), cut(v), added._replace(keys=keys, per_key=per_key), jax.tree.map(cut, of_keys)


def _scan_blocks(visit, start, S: int, block: int):
    """Fold `visit` over block starts; a single block needs no loop."""
    if block == S:
        carry, y = visit(start, 0)
        return carry, jax.tree.map(lambda x: x[None], y)
    return jax.lax.scan(visit, start, jnp.arange(0, S, block))


_attention.defvjp(_forward, _backward)
