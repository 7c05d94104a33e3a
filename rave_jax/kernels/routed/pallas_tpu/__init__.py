"""Routed attention in Mosaic kernels for TPUs: what queries did not choose is not computed.

Three parts are merged by their log-sum-exps: keys without a region, for all queries, and keys of regions for queries
that are not routed, both by those of `kernels.attention`; and regions for the queries that are routed, by kernels that
gather queries for each tile of keys. The choice is made in blocks of queries, and has no gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.kernels import saved, support
from rave_jax.kernels.attention import KeyGroups, MaskCodes
from rave_jax.kernels.attention import pallas_tpu as dense
from rave_jax.kernels.attention.base import NOWHERE, Terms, group_heads, of_key_group, tile_bias, ungroup_heads
from rave_jax.kernels.attention.pallas_tpu.blocks import BlockSizes
from rave_jax.kernels.attention.pallas_tpu.operands import pad, up
from rave_jax.kernels.attention.pallas_tpu.tile import LANES, LOG2E, UNSEEN
from rave_jax.kernels.attention.tuning import block_sizes
from rave_jax.kernels.routed.base import RouteRule, Routes, candidates, choose, region_scores
from rave_jax.kernels.routed.base import of_regions as of_regions_terms
from rave_jax.kernels.routed.pallas_tpu import lists
from rave_jax.kernels.routed.pallas_tpu.backward import backward, numbers_of
from rave_jax.kernels.routed.pallas_tpu.forward import forward
from rave_jax.kernels.routed.pallas_tpu.lists import Placed, Tiling, Work
from rave_jax.kernels.routed.pallas_tpu.sizes import against, choices_of, item_sizes, make_call, tiling_of
from rave_jax.kernels.routed.pallas_tpu.terms import RowTerms, TermRows, without_key_bias
from rave_jax.kernels.routed.pallas_tpu.walk import Call, ItemSizes
from rave_jax.kernels.routed.shards import split
from rave_jax.parallel.sharding import current_mesh
from rave_jax.typing import Array, Bool, Float, Int

__all__ = ["ItemSizes", "against", "attention", "item_sizes"]

MOST_SCORES = 1 << 23
"""Scores of regions that are made at once."""
BOUND = 100.0
"""How far in log2 a row's sum may be from its reference."""


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    codes: MaskCodes,
    terms: Terms,
    scale: float,
    routes: Routes,
    rule: RouteRule,
    most_keys: int,
    sizes: ItemSizes | None = None,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T H"]]:
    """Routed attention, over the current mesh where there is one; see `api.attention` and `against`."""
    kind, interpret = support.target().device_kind, support.interpreter()
    sizes, blocks = sizes or item_sizes(kind), block_sizes(kind)
    run = functools.partial(
        on_device, scale=scale, rule=rule, most_keys=most_keys, sizes=sizes, blocks=blocks, interpret=interpret
    )
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return run(q, k, v, codes, terms, routes)
    return split(run, q, k, v, codes, terms, routes)


def on_device(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    codes: MaskCodes,
    terms: Terms,
    routes: Routes,
    *,
    scale: float,
    rule: RouteRule,
    most_keys: int,
    sizes: ItemSizes,
    blocks: BlockSizes,
    interpret: Any,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T H"]]:
    """All three parts on one device."""
    plain = functools.partial(dense.attention, terms=terms, scale=scale, blocks=blocks, interpret=interpret)
    parts = [plain(q, k, v, codes) for codes in dense_codes(codes, routes)]
    tiling = tiling_of(routes.first.shape[1], most_keys, sizes)
    choices = choices_of(rule, q.shape[2] // k.shape[2])
    terms = without_key_bias(terms, q.shape[1], k.shape[2])
    of_rows = RowTerms.of(terms, str(q.dtype))
    call = make_call(q, k, tiling, sizes, scale, interpret=interpret, choices=choices, terms=of_rows)
    assert call is not None
    parts.append(of_regions(q, k, v, codes, terms, routes, rule, call))
    # Kept for the backward pass are the parts, not what merging makes of each in float32.
    return jax.checkpoint(merged)(*zip(*parts, strict=True))


def dense_codes(codes: MaskCodes, routes: Routes) -> tuple[MaskCodes, MaskCodes]:
    """Of keys without a region, for all queries; and of the others, for queries that are not routed."""
    of = KeyGroups((routes.keys > 0).astype(jnp.int32), 2)
    routed = routes.before > NOWHERE
    apart = of_key_group(codes, of, 1)
    shut = apart._replace(
        lo=jnp.where(routed, 1, apart.lo),
        hi=jnp.where(routed, 0, apart.hi),
        open_q=jnp.where(routed, NOWHERE, apart.open_q),
    )
    return of_key_group(codes, of, 0), shut


def merged(
    outs: tuple[Float[Array, "B T H h"], ...], lses: tuple[Float[Array, "B T H"], ...]
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T H"]]:
    """Attention over disjoint keys as one. A part that saw nothing has no weight and no gradient."""
    lse = jnp.stack(lses)
    seen = lse != -jnp.inf
    top = jax.lax.stop_gradient(jnp.max(lse, axis=0))
    top = jnp.where(top != -jnp.inf, top, 0.0)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, lse, 0.0) - top), 0.0)
    total = jnp.sum(weights, axis=0)
    some = jnp.any(seen, axis=0)
    safe = jnp.where(some, total, 1.0)
    out = sum(w[..., None] * x.astype(jnp.float32) for w, x in zip(weights, outs, strict=True)) / safe[..., None]
    return out.astype(outs[0].dtype), jnp.where(some, jnp.log(safe) + top, -jnp.inf)


class Ints(NamedTuple):
    """What the kernels read beside q, k and v, without gradients."""

    reference: Float[Array, "B K lines lanes"]
    codes_q: Int[Array, "B blocks 1 codes"]
    codes_k: Int[Array, "B tiles eight lanes"]
    work: Work
    visited: Bool[Array, "B K T #rows"]


def of_regions(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    codes: MaskCodes,
    terms: Terms,
    routes: Routes,
    rule: RouteRule,
    call: Call,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T H"]]:
    """Attention of routed queries to regions; 0 and -inf for the others. NaN in both for a row with a region of more
    keys than `most_keys`."""
    T, h, tiling = q.shape[1], q.shape[3], call.tiling
    placed = lists.place(routes.keys, tiling)
    tiles = [_tiles(x, placed.source, placed.lane, tiling) for x in (k, v)]
    ints = jax.lax.stop_gradient(_ints(q, k, codes, terms, routes, rule, placed, call))
    queries = group_heads(pad(pad(q, 1, call.T), 3, LANES), call.K)
    queries = pad(jnp.moveaxis(queries, 2, 3), 3, call.rows)
    rows: TermRows = ()
    if call.terms:
        of_keys = call.terms.key_rows(terms, k.shape[:3])
        # An empty lane has some key's numbers: a function need not be fit for zeros.
        some = jnp.minimum(placed.source, k.shape[1] - 1)
        rows = (
            call.terms.query_rows(terms, q.shape[:3], call.T, call.K, call.rows),
            _tiles(of_keys, some, placed.lane, tiling),
        )
    out, lse = _attention(queries, *tiles, rows, ints, call)
    out, lse = (ungroup_heads(jnp.moveaxis(x[:, :, :, : call.G], 3, 2))[:, :T] for x in (out, lse))
    lse = jnp.where(lse >= UNSEEN, -jnp.inf, lse * (1 / LOG2E))
    # Added, not chosen: a choice would keep a mask as large as the output for the backward pass.
    bad = jnp.where(placed.overfull, jnp.nan, 0.0)[:, None, None]
    return out[..., :h] + bad[..., None].astype(out.dtype), lse + bad


def _ints(
    q: Array,
    k: Array,
    codes: MaskCodes,
    terms: Terms,
    routes: Routes,
    rule: RouteRule,
    placed: Placed,
    call: Call,
) -> Ints:
    tiling, blocks = call.tiling, call.blocks
    B, R, S = q.shape[0], tiling.regions, k.shape[1]
    open_, reference = _choices(q, k, codes, terms, routes, rule, call)
    codes_q = {
        "lo": pad(codes.lo, 1, call.T, 1),
        "hi": pad(codes.hi, 1, call.T),
        "open_q": pad(codes.open_q, 1, call.T),
    }
    whole = lists.whole_pairs(codes._replace(**codes_q), routes)
    held = placed.held.reshape(B, tiling.tiles, tiling.lanes)
    sizes = call.queries, call.item, call.length, 2 * call.rows
    made = lists.work(open_, whole, held.all(-1), tiling, *sizes, call.words)

    region, _ = tiling.lane_map()
    bit = np.where(np.arange(tiling.tiles)[:, None] < R * tiling.full, 0, region % max(tiling.sharing, 1))
    bits = jnp.where(held, 1 << jnp.asarray(bit, jnp.int32), 0)
    at = jnp.minimum(placed.source, S - 1)
    order, open_k = (jnp.take_along_axis(x, at, axis=1).reshape(held.shape) for x in (codes.order, codes.open_k))
    keys = jnp.stack([bits, order, open_k], axis=2).astype(jnp.int32)
    per_query = jnp.stack([x.reshape(B, blocks, call.queries) for x in codes_q.values()], axis=2)
    return Ints(
        reference.reshape(B, call.K, -1, LANES),
        per_query.reshape(B, blocks, 1, -1).astype(jnp.int32),
        pad(keys, 2, 8),
        made,
        _visited(open_, call),
    )


def _visited(open_: Int[Array, "B K T R"], call: Call) -> Bool[Array, "B K T #rows"]:
    """Which rows of a query, or which queries, see anything. Rows without a head are left out."""
    if call.choices == 1:
        return jnp.any(open_ != 0, axis=-1, keepdims=True)
    found = [jnp.any((open_ >> head) & 1, axis=-1) for head in range(call.choices)]
    return pad(jnp.stack(found, axis=-1), 3, call.rows)


def _choices(
    q: Array, k: Array, codes: MaskCodes, terms: Terms, routes: Routes, rule: RouteRule, call: Call
) -> tuple[Int[Array, "B K T R"], Float[Array, "B K T rows"]]:
    """Which choices of queries open which regions (`lists.open_heads`), and the reference of every row: of the regions
    that it sees, the largest score of their mean keys, with the terms of their means, in log2."""
    (B, T, H, _), R = q.shape, call.tiling.regions
    means, openings = _means(k, routes.keys, R), lists.region_openings(codes.open_k, routes.keys, R)
    block = max(8, MOST_SCORES // (B * H * R) // 8 * 8)
    block = min(block, T)
    of_means = Terms(of_regions_terms(terms.parts, routes.keys, R))
    mine = (
        q,
        {"lo": codes.lo, "hi": codes.hi, "open_q": codes.open_q},
        routes.queries(),
        of_means.of_queries(),
    )

    def of_block(mine: Any) -> tuple[Array, Array]:
        q, codes_q, routes_q, terms_q = mine
        own, given = codes._replace(**codes_q), routes.with_queries(routes_q)
        choice = choose(region_scores(given, call.scale), candidates(own, given), given.dense, rule)
        pairs = lists.open_pairs(choice, own, given, openings)
        scores = jnp.einsum("BKGTh,BKRh->BKGTR", group_heads(q, call.K), means.astype(q.dtype), precision="highest")
        dot = scores.astype(jnp.float32) * call.scale
        scores = sum((tile_bias(term, dot, call.K) for term in of_means.with_queries(terms_q).parts), dot)
        best = jnp.max(jnp.where(pairs, scores, -jnp.inf), axis=-1)
        best = jnp.where(jnp.isfinite(best), best * LOG2E, 0.0)
        return jnp.moveaxis(lists.open_heads(pairs), 2, 0), jnp.moveaxis(best, 3, 0)

    fill = -T % block
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)), mine)
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0), padded)
    open_, best = (x.reshape(-1, *x.shape[2:])[:T] for x in jax.lax.map(of_block, cut))
    open_ = pad(jnp.moveaxis(open_, 0, 2), 2, call.T)
    return open_, pad(pad(jnp.moveaxis(best, 0, 2), 2, call.T), 3, call.rows)


def _means(k: Float[Array, "B S K h"], keys: Int[Array, "B S"], R: int) -> Float[Array, "B K R h"]:
    """Mean key of every region; 0 of one without keys."""

    of_region = keys[..., None] == jnp.arange(1, R + 1)
    total = jnp.einsum("BSR,BSKh->BKRh", of_region.astype(k.dtype), k, preferred_element_type=jnp.float32)
    return total / jnp.maximum(jnp.sum(of_region, axis=1), 1)[:, None, :, None]


def _tiles(
    x: Float[Array, "B S K h"], source: Int[Array, "B n"], lane: Int[Array, "B S"], tiling: Tiling
) -> Float[Array, "B K tiles lanes width"]:
    """Keys in their lanes, zeros in empty ones."""
    found = _moved(x, source, lane)
    B, _, K, h = found.shape
    return pad(jnp.moveaxis(found, 2, 1).reshape(B, K, tiling.tiles, tiling.lanes, h), 4, up(h, LANES))


@jax.custom_vjp
def _moved(x: Float[Array, "B S K h"], there: Int[Array, "B n"], back: Int[Array, "B S"]) -> Float[Array, "B n K h"]:
    """Entry `there` of x at every place, 0 where there is none; `back` says where each entry went, which makes the
    gradient a gather too."""
    return jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="fill", fill_value=0))(x, there)


def _moved_forward(x, there, back):
    return _moved(x, there, back), (there, back)


def _moved_backward(saved, d):
    there, back = saved
    return _moved(d, back, there), *(np.zeros(n.shape, jax.dtypes.float0) for n in saved)


_moved.defvjp(_moved_forward, _moved_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, rows: TermRows, ints: Ints, call: Call):
    return _forward(q, k, v, rows, ints, call)[0]


def _forward(q, k, v, rows: TermRows, ints: Ints, call: Call):
    work = ints.work.lists.reshape(-1), ints.work.info
    given = (q, ints.reference, k, v, ints.codes_q, ints.codes_k, *work, rows, call)
    out, lse = forward(*given, online=False)
    far = jnp.abs(lse - ints.reference).reshape(*q.shape[:4])
    ok = jnp.all((far < BOUND) | ~ints.visited) & jnp.all(jnp.isfinite(out))
    out, lse = jax.lax.cond(ok, lambda: (out, lse), lambda: forward(*given, online=True))
    out, lse = saved.of_attention(out, lse.reshape(q.shape[:4]))
    return (out, lse), (q, k, v, rows, ints, out, lse)


def _backward(call: Call, kept, cotangents):
    q, k, v, rows, ints, out, lse = kept
    d_out, d_lse = cotangents
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse * LOG2E
    work = ints.work.lists.reshape(-1), ints.work.info
    numbers = numbers_of(lse, delta, call)
    grads = backward(q, k, v, d_out, numbers, ints.codes_q, ints.codes_k, *work, rows, call)
    return *grads[:3], grads[3:], jax.tree.map(_no_gradient, ints)


_attention.defvjp(_forward, _backward)


def _no_gradient(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
