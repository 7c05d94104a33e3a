"""Which tiling and super-block a call gets, and what the kernels cannot serve."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rave_jax.kernels import support
from rave_jax.kernels.attention import KeyGroups
from rave_jax.kernels.attention.base import Terms
from rave_jax.kernels.attention.pallas_tpu.operands import up
from rave_jax.kernels.attention.pallas_tpu.tile import LANES
from rave_jax.kernels.routed.base import RouteRule
from rave_jax.kernels.routed.pallas_tpu.lists import PLACE_BITS, Tiling
from rave_jax.kernels.routed.pallas_tpu.terms import NO_TERMS, RowTerms, without_key_bias
from rave_jax.kernels.routed.pallas_tpu.walk import Call, ItemSizes
from rave_jax.typing import Array

BY_DEVICE_KIND = {
    "TPU v5 lite": ItemSizes(wide=0.83),
    "TPU v6 lite": ItemSizes(chunks=(16, 32)),
}
"""From `benchmarks/routed_kernels.py`, unverified on hardware."""
OTHER = ItemSizes(chunks=(16, 32), vmem_bytes=40 << 20)
"""For the others: v5p and TPU7x have half of the memory on the chip."""
MOST_HEADS = 64
"""Query heads of a kv head."""
MOST_CHOICES = 32
"""The same where each has a choice of its own: a bit of a number for each."""
SHARE = 0.25
"""Chance that a query chooses a region, by which tilings are compared: the default of `RouteRule.top_k`."""


def tiling_of(regions: int, most_keys: int, sizes: ItemSizes) -> Tiling:
    """The cheaper of tiles of 128 and of 256 keys; 128 where these fill lanes better: memory bounds the super-block."""
    narrow, wide = (Tiling(regions, most_keys, lanes) for lanes in (LANES, 2 * LANES))
    cheaper = sizes.wide * wide.visits(SHARE) < 0.97 * narrow.visits(SHARE)
    return wide if cheaper and wide.fill >= 0.9 * narrow.fill else narrow


def item_sizes(device_kind: str) -> ItemSizes:
    """How queries are taken on a chip, as `jax.Device.device_kind` names it."""
    return BY_DEVICE_KIND.get(device_kind, OTHER)


def make_call(
    q: Array,
    k: Array,
    tiling: Tiling,
    sizes: ItemSizes,
    scale: float,
    *,
    interpret: Any,
    choices: int = 1,
    terms: RowTerms = NO_TERMS,
    fixed: Any = None,
) -> Call | None:
    """Sizes of a call: the largest super-block that fits beside the keys, or None where none does. A query has so many
    `choices`."""
    (B, T, H, _), K = q.shape, k.shape[2]
    queries = min(sizes.queries, up(T, sizes.item))
    while queries >= sizes.item:
        call = Call(
            B=B,
            K=K,
            G=H // K,
            T=up(T, queries),
            tiling=tiling,
            queries=queries,
            item=sizes.item,
            together=sizes.together,
            chunks=sizes.chunks,
            scale=scale,
            dtype=str(q.dtype),
            interpret=interpret,
            choices=choices,
            terms=terms,
            fixed=fixed,
        )
        if vmem_bytes(call) <= sizes.vmem_bytes and 2 * call.places <= 1 << PLACE_BITS:
            return call
        queries = queries // 2 // sizes.item * sizes.item
    return None


def choices_of(rule: RouteRule, group: int) -> int:
    """Choices of a query, whose `group` heads read one kv head."""
    return group if rule.share == "head" else 1


def vmem_bytes(call: Call) -> int:
    """Of the backward kernel, which needs more."""
    wide = jnp.dtype(call.dtype).itemsize
    # Of keys: k, v and their gradients, the latter twice, and sums of these in float32. Of queries: q, d_out, dq, all
    # twice, and what is gathered from in float32.
    keys = call.tiling.tiles * call.tiling.lanes * (LANES * (6 * wide + 8) + 64)
    queries = call.queries * (call.rows * LANES * (6 * wide + 12) + 6 * LANES * 4)
    if call.terms:
        # Rows in float32: of keys once, of queries twice, and the gradients of both twice.
        keys += call.tiling.tiles * call.tiling.lanes * 3 * call.terms.width * 4
        queries += call.queries * call.rows * 4 * call.terms.width * 4
    return keys + queries


def against(
    q: Array,
    k: Array,
    v: Array,
    terms: Terms,
    key_groups: KeyGroups | None,
    rule: RouteRule,
    regions: int,
    most_keys: int | None,
    sizes: ItemSizes,
) -> str | None:
    """Why the kernels cannot serve, or None."""
    found = support.against_pallas_tpu(q, k, v)
    if found is not None:
        return found
    G = q.shape[2] // k.shape[2]
    if rule.choice != "hard" or rule.by != "descriptor":
        return f"choices must be hard and by descriptors, not {rule.choice} by {rule.by}"
    if key_groups is not None:
        return "key groups are not supported"
    row_terms = RowTerms.of(without_key_bias(terms, q.shape[1], k.shape[2]), str(q.dtype))
    if max(q.shape[-1], v.shape[-1]) > LANES or q.shape[-1] != v.shape[-1]:
        return f"keys and values must have one width of at most {LANES}, not {q.shape[-1]} and {v.shape[-1]}"
    most, own = (MOST_CHOICES, " that choose for themselves") if choices_of(rule, G) > 1 else (MOST_HEADS, "")
    if most < G:
        return f"at most {most} query heads{own} may share a kv head, not {G}"
    if most_keys is None:
        return "the most keys of a region must be known (Routing.most_keys)"
    tiling = tiling_of(regions, most_keys, sizes)
    if make_call(q, k, tiling, sizes, 1.0, interpret=False, terms=row_terms) is None:
        return f"{regions} regions of {most_keys} keys do not fit into the chip's memory"
    return None
