"""Attention steps for the TPU compiler, each made as `compile_cases` wants it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention import MaskCodes, Terms, pallas_tpu
from rave_jax.kernels.attention.tuning import block_sizes
from tests.kernels.drawn import PairBias
from tests.kernels.score_terms import terms_of


def step(
    place: Any,
    *,
    kind: str,
    queries: int,
    keys: int,
    group: int,
    head_dim: int = 128,
    rank: int = 16,
    dtype: str = "bfloat16",
    form: str | None = "log_gate",
    key_bias: bool = False,
    rows: int = 1,
    kv_heads: int = 1,
    forward_only: bool = False,
) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward pass of the kernels with the blocks of a device kind; `form` as `score_terms` has it, None
    has no term."""
    heads, f32 = kv_heads * group, jnp.float32
    q = place((rows, queries, heads, head_dim), dtype)
    kv = place((rows, keys, kv_heads, head_dim), dtype)
    floats: dict[str, Any] = {
        "u": place((rows, queries, heads, rank), f32),
        "w": place((rows, keys, kv_heads, rank), f32),
        "row": place((rows, queries, heads), f32),
        "key": place((rows, keys, kv_heads), f32),
        "gain": place((heads,), f32),
    }
    on = {"query_on": place((rows, queries, heads), jnp.bool_), "key_on": place((rows, keys), jnp.bool_)}
    made = () if form is None else jax.eval_shape(lambda gate: terms_of(gate, form), PairBias(**floats, **on))
    parts = jax.tree.map(lambda x: place(x.shape, x.dtype), made)
    per_key = place((rows, keys, heads), f32) if key_bias else None
    lengths = MaskCodes(lo=queries, hi=queries, order=keys, open_q=queries, open_k=keys)
    codes = MaskCodes(*(place((rows, n), jnp.int32) for n in lengths))

    def attend(q: Any, k: Any, v: Any, terms: Terms, codes: MaskCodes) -> Any:
        return pallas_tpu.attention(q, k, v, codes, terms, head_dim**-0.5, blocks=block_sizes(kind))

    def run(q: Any, k: Any, v: Any, terms: Terms, codes: MaskCodes, d_out: Any, d_lse: Any) -> Any:
        if forward_only:
            return attend(q, k, v, terms, codes)
        made, pull = jax.vjp(lambda *args: attend(*args, codes), q, k, v, terms)
        return made, pull((d_out, d_lse))

    return run, (q, kv, kv, Terms(parts, per_key), codes, q, place((rows, queries, heads), f32))
