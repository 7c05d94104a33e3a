"""Attention to chosen regions for the TPU compiler, made as `compile_cases` wants it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rave_jax.kernels.pair_bias import PairForm
from rave_jax.kernels.routed.gather import RegionBias, pallas_tpu
from rave_jax.kernels.routed.gather.base import Operands, Stack, listed, union


def decode(
    place: Any,
    *,
    regions: int,
    slots: int,
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
    """The kernel and what is made for it; form None has no gate. Gate keys are kept flat, a region in a row."""
    heads, cache, f32 = kv_heads * group, (rows, kv_heads, regions, slots), jnp.float32
    bias = None
    if form is not None:
        floats = [(rows, heads, rank), (*cache[:3], slots * rank), (rows, heads), cache, (heads,)]
        bias = RegionBias(*(place(shape, f32) for shape in floats), place((rows, heads), jnp.bool_))
    widths = head_dim, value_dim or head_dim
    operands = Operands(
        place((rows, kv_heads, group, head_dim), dtype),
        *(Stack(place((layers, *cache, width), dtype), None, place((), jnp.int32)) for width in widths),
        place((rows, regions, slots), jnp.bool_),
        place((rows, kv_heads, group if apart else 1, regions), jnp.bool_),
        bias,
    )
    how = PairForm() if form is None else PairForm(form)

    def run(operands: Operands) -> Any:
        if operands.bias is not None:
            w = operands.bias.w.reshape(*cache, rank)
            operands = operands._replace(bias=operands.bias._replace(w=w))
        index, count = listed(union(operands.chosen), pallas_tpu.length_of_list(operands, most))
        return pallas_tpu.over(operands, index, count, how, head_dim**-0.5)

    return run, (operands,)
