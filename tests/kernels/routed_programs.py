"""Routed attention for the TPU compiler, made as `compile_cases` wants it."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention import MaskCodes, Terms
from rave_jax.kernels.attention.tuning import block_sizes
from rave_jax.kernels.routed import RouteRule, Routes, pallas_tpu
from rave_jax.kernels.routed.pallas_tpu.sizes import item_sizes
from tests.kernels.drawn import PairBias
from tests.kernels.score_terms import terms_of


def step(
    place: Any,
    *,
    kind: str,
    tokens: int,
    regions: int,
    most_keys: int,
    group: int = 8,
    kv_heads: int = 1,
    head_dim: int = 128,
    rows: int = 1,
    top_k: float = 0.25,
    scheduled: bool = True,
    dtype: str = "bfloat16",
    share: Literal["head", "group"] = "group",
    terms: str = "",
    rank: int = 16,
) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward pass of all three parts, with the blocks of a device kind. `terms` as in `score_terms`."""
    heads, f32, i32 = kv_heads * group, jnp.float32, jnp.int32
    q = place((rows, tokens, heads, head_dim), dtype)
    kv = place((rows, tokens, kv_heads, head_dim), dtype)
    codes = MaskCodes(*(place((rows, tokens), i32),) * 5)
    routes = Routes(
        place((rows, tokens, heads, head_dim), f32),
        place((rows, regions, kv_heads, head_dim), f32),
        *(place((rows, regions), i32),) * 2,
        *(place((rows, tokens), i32),) * 2,
        place((), f32) if scheduled else None,
    )
    rule, of_queries, of_keys = RouteRule(top_k, share=share), (rows, tokens, heads), (rows, tokens, kv_heads)
    sides = place((*of_queries, rank), f32), place((*of_keys, rank), f32)
    floats = *sides, place(of_queries, f32), place(of_keys, f32), place((heads,), f32)
    switches = place(of_queries, jnp.bool_), place((rows, tokens), jnp.bool_)

    def run(
        q: Any, k: Any, v: Any, floats: Any, switches: Any, codes: MaskCodes, routes: Routes, *cotangents: Any
    ) -> Any:
        def attend(q: Any, k: Any, v: Any, floats: Any) -> Any:
            parts = terms_of(PairBias(*floats, *switches), terms) if terms else ()
            return pallas_tpu.on_device(
                q,
                k,
                v,
                codes,
                Terms(parts),
                routes,
                scale=head_dim**-0.5,
                rule=rule,
                most_keys=most_keys,
                sizes=item_sizes(kind),
                blocks=block_sizes(kind),
                interpret=False,
            )

        made, pull = jax.vjp(attend, q, k, v, floats)
        return made, pull(cotangents)

    return run, (q, kv, kv, floats, switches, codes, routes, q, place(of_queries, f32))
