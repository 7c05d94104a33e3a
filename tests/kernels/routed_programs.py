"""Routed attention for the TPU compiler, made as `compile_cases` wants it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.attention.tuning import block_sizes
from rave_jax.kernels.routed import RouteRule, Routes, pallas_tpu
from rave_jax.kernels.routed.pallas_tpu.sizes import item_sizes


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
) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward pass of all three parts, with the blocks of a device kind."""
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
    rule = RouteRule(top_k, share="group")

    def run(q: Any, k: Any, v: Any, codes: MaskCodes, routes: Routes, d_out: Any, d_lse: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return pallas_tpu.on_device(
                q,
                k,
                v,
                codes,
                routes,
                scale=head_dim**-0.5,
                rule=rule,
                most_keys=most_keys,
                sizes=item_sizes(kind),
                blocks=block_sizes(kind),
                interpret=False,
            )

        made, pull = jax.vjp(attend, q, k, v)
        return made, pull((d_out, d_lse))

    return run, (q, kv, kv, codes, routes, q, place((rows, tokens, heads), f32))
