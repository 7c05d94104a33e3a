"""Attention to chosen regions for the TPU compiler, made as `compile_cases` wants it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.kernels.routed import HostRegions, gather_attention, host
from rave_jax.kernels.routed.gather import pallas_tpu
from rave_jax.kernels.routed.gather.base import Operands, Stack, listed, union
from tests.kernels.drawn import PairBias
from tests.kernels.score_terms import terms_of


def decode(
    place: Any,
    *,
    regions: int,
    entries: int,
    most: int,
    group: int = 7,
    apart: bool = False,
    head_dim: int = 128,
    value_dim: int | None = None,
    rank: int = 16,
    dtype: str = "bfloat16",
    form: str | None = None,
    rows: int = 1,
    kv_heads: int = 2,
    layers: int = 3,
) -> tuple[Any, tuple[Any, ...]]:
    """The kernel and what is made for it; `form` as `score_terms` has it, None has no term. The keys' side of a pair
    product is kept flat, a region in a row."""
    heads, cache, f32 = kv_heads * group, (rows, kv_heads, regions, entries), jnp.float32
    terms: Any = ()
    if form is not None:
        shapes = [(rows, heads, rank), (*cache, rank), (rows, heads), cache, (heads,)]
        floats = [jax.ShapeDtypeStruct(shape, f32) for shape in shapes]
        on = [jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in ((rows, heads), (rows, regions, entries))]
        made = jax.eval_shape(lambda *xs: terms_of(PairBias(*xs), form), *floats, *on)
        terms = jax.tree.map(lambda x: place(x.shape if x.ndim < 5 else _flat(x.shape), x.dtype), made)
    widths = head_dim, value_dim or head_dim
    operands = Operands(
        place((rows, kv_heads, group, head_dim), dtype),
        *(Stack(place((layers, *cache, width), dtype), None, place((), jnp.int32)) for width in widths),
        place((rows, regions, entries), jnp.bool_),
        place((rows, kv_heads, group if apart else 1, regions), jnp.bool_),
        terms,
    )

    def run(operands: Operands) -> Any:
        terms = (x if x.w is None else x.replace(w=x.w.reshape(*cache, -1)) for x in operands.terms)
        operands = operands._replace(terms=tuple(terms))
        index, count = listed(union(operands.chosen), pallas_tpu.length_of_list(operands, most))
        return pallas_tpu.over(operands, index, count, head_dim**-0.5)

    return run, (operands,)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return *shape[:3], shape[3] * shape[4]


def decode_from_host(
    place: Any,
    *,
    regions: int,
    entries: int,
    most: int,
    group: int = 7,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    rows: int = 2,
    kv_heads: int = 2,
    layers: int = 3,
) -> tuple[Any, tuple[Any, ...]]:
    """A step's attention over regions in host memory, layer after layer as a decoder goes through them."""
    cache, heads = (rows, kv_heads, regions, entries), kv_heads * group
    kept = _on_host(place, (layers, *cache, head_dim), dtype)
    scale = place((layers, *cache), jnp.float32) if dtype == "int8" else None
    q = place((rows, heads, head_dim), jnp.bfloat16)
    real, chosen = place((rows, regions, entries), jnp.bool_), place((rows, kv_heads, group, regions), jnp.bool_)

    def run(q: Any, k: HostRegions, v: HostRegions, scale: Any, real: Any, chosen: Any) -> Any:
        def layer(carry: Any, n: Any) -> Any:
            q, k, v = carry
            stacks = Stack(k, scale, n), Stack(v, scale, n)
            out, _ = gather_attention(q, *stacks, real, chosen, most, scale=head_dim**-0.5, implementation="xla")
            return (out, k, v), None

        (q, _, _), _ = jax.lax.scan(layer, (q, _marked(k), _marked(v)), jnp.arange(layers))
        return q

    return run, (q, kept, kept, scale, real, chosen)


def read_from_host(
    place: Any, *, regions: int, entries: int, reach: int, dtype: str = "bfloat16", rows: int = 4, head_dim: int = 128
) -> tuple[Any, tuple[Any, ...]]:
    """One row's first regions, as a prompt is read: brought, and put back changed."""
    kept = _on_host(place, (3, rows, 2, regions, entries, head_dim), dtype)

    def run(kept: HostRegions, row: Any) -> Any:
        kept = _marked(kept)
        return kept.with_row(row, kept.of_rows(row[None], reach)[:, 0] + 1)

    return run, (kept, place((), jnp.int32))


def _on_host(place: Any, shape: tuple[int, ...], dtype: str) -> HostRegions:
    kept = jax.eval_shape(lambda: host.empty(shape, jnp.dtype(dtype)))
    tiles = place(kept.tiles.shape, kept.dtype)
    tiles = jax.ShapeDtypeStruct(tiles.shape, tiles.dtype, sharding=tiles.sharding.with_memory_kind("pinned_host"))
    return dataclasses.replace(kept, tiles=tiles)


def _marked(kept: HostRegions) -> HostRegions:
    """Known to be in host memory, as arrays are and shapes of them are not."""
    return dataclasses.replace(kept, tiles=jax.device_put(kept.tiles, jax.memory.Space.Host))
