"""The forward kernel: one block of queries stays, blocks of keys pass by, an online softmax in scratch memory.

All query heads of a kv head are in one grid step: keys, values, mask and the keys' side of score terms are made once
for all of them. The heads are visited one at a time, or, where queries are few, all as one matrix.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention.pallas_tpu import tile
from rave_jax.kernels.attention.pallas_tpu.added import forward_scratch, parts_of
from rave_jax.kernels.attention.pallas_tpu.blocks import when_each
from rave_jax.kernels.attention.pallas_tpu.operands import Call, Codes, Packed
from rave_jax.kernels.attention.pallas_tpu.specs import Inputs, compiler_params, cost, input_specs
from rave_jax.kernels.attention.pallas_tpu.tile import LANES, MASKED, UNSEEN
from rave_jax.typing import Array, Float, Int

ROWS_AT_ONCE = 512
"""Heads are taken together while their queries are no more than this."""


def forward(
    packed: Packed, codes: Codes, facts: tuple[Int[Array, "n"], ...], call: Call
) -> tuple[Float[Array, "B K G T c"], Float[Array, "B K G T"]]:
    """(output, log-sum-exp in log2 with UNSEEN for rows that saw nothing and G padded to whole sublanes)."""
    block_q, block_k = call.forward
    grid = (call.B, call.K, call.T // block_q, call.S // block_k)
    visit = call.visit(grid[2], grid[3])

    def at(b, n, i, j, *facts):
        return b, n, i, visit.key_block(facts, b, i, j)

    G, Gp, c = call.G, call.padded_group, call.c
    scratch = {
        "top": pltpu.VMEM((G, block_q, LANES), jnp.float32),
        "total": pltpu.VMEM((G, block_q, LANES), jnp.float32),
        "sum": pltpu.VMEM((G, block_q, c), jnp.float32),
        "bounds": pltpu.VMEM((3, block_q, LANES), jnp.int32),
        "mask": pltpu.VMEM((block_q, block_k), jnp.float32),
    }
    scratch |= forward_scratch(call, block_q)
    specs = input_specs(call, block_q, block_k, at)
    inputs = specs.arrays(packed, codes)
    outputs = (
        jax.ShapeDtypeStruct((call.B, call.K, G, call.T, c), packed["q"].dtype),
        jax.ShapeDtypeStruct((call.B, call.K, Gp, call.T), jnp.float32),
    )
    out_specs = (
        pl.BlockSpec((1, 1, G, block_q, c), lambda b, n, i, j, *_: (b, n, 0, i, 0)),
        pl.BlockSpec((1, 1, Gp, block_q), lambda b, n, i, j, *_: (b, n, 0, i)),
    )
    run = pl.pallas_call(
        functools.partial(
            _kernel, call=call, visit=visit, facts=len(facts), names=specs.names, scratch_names=tuple(scratch)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(facts),
            grid=grid,
            in_specs=specs.blocks,
            out_specs=out_specs,
            scratch_shapes=tuple(scratch.values()),
        ),
        out_shape=outputs,
        compiler_params=compiler_params(in_turn=1),
        cost_estimate=cost(call, grid, inputs, specs, outputs, products=2, pair_products=1),
        interpret=call.interpret,
        name="attention_forward",
    )
    return run(*facts, *inputs)


def _kernel(*refs, call: Call, visit: Any, facts: int, names: tuple[str, ...], scratch_names: tuple[str, ...]):
    known, refs = refs[:facts], refs[facts:]
    inputs = Inputs(dict(zip(names, refs, strict=False)))
    out_ref, lse_ref = refs[len(names) : len(names) + 2]
    scratch = dict(zip(scratch_names, refs[len(names) + 2 :], strict=True))
    b, kv_head, i, j = (pl.program_id(n) for n in range(4))
    last = j == pl.num_programs(3) - 1
    block_q, block_k = call.forward
    heads = call.G if call.G * block_q <= ROWS_AT_ONCE and block_q % 16 == 0 else 1
    rows = heads * block_q
    product = functools.partial(tile.product, interpreted=bool(call.interpret))
    parts = parts_of(call, inputs, scratch)

    @pl.when(j == 0)
    def _start():
        scratch["top"][...] = jnp.full(scratch["top"].shape, MASKED, jnp.float32)
        scratch["total"][...] = jnp.zeros(scratch["total"].shape, jnp.float32)
        scratch["sum"][...] = jnp.zeros(scratch["sum"].shape, jnp.float32)
        inputs.keep_queries(scratch, call)
        for part in parts:
            part.keep_queries(kv_head)

    def visit_keys(masked: bool, on: frozenset[int]) -> None:
        k, v = inputs.k(), inputs.v()
        active = [(part, part.keys()) for part in parts if part.active(on)]
        folded = next((part for part, _ in active if part.term.folded), None)
        for part, keys in active:
            if part is folded:
                k = tile.beside(k, keys.W)
        if masked:
            lo, hi, open_q = (tile.wide(scratch["bounds"][n], block_k) for n in range(3))
            scratch["mask"][...] = tile.mask(lo, hi, open_q, inputs.order(), inputs.open_k())

        def visit_heads(n: Any, _: None) -> None:
            of = pl.ds(n * heads, heads)
            q = inputs.query_head("q", n, heads)
            if folded is not None:
                q = jnp.concatenate([q, folded.of_queries(n, heads)], axis=1)
            dot, x = tile.exponent(product(q, k, (1, 1)), call.scale, any(part.term.reads_dot for part, _ in active))
            if call.key_bias:
                x = x + _rows(inputs.key_bias(n, heads), block_q)
            late = None
            for part, keys in active:
                if part is folded:
                    continue
                shift = part.shift(dot if part.term.reads_dot else None, keys, n, heads, x.shape)
                if not part.term.late:
                    x = x + shift
                else:
                    late = shift if late is None else late + shift
            if masked:
                x = (x.reshape(heads, block_q, block_k) + scratch["mask"][...][None]).reshape(rows, block_k)
            top = scratch["top"][of].reshape(rows, LANES)
            new_top = jnp.maximum(top, jnp.max(x, axis=1, keepdims=True))
            x = x - tile.wide(new_top, block_k)
            weights = jnp.exp2(x if late is None else x + late)
            shrink = jnp.exp2(top - new_top)
            total = shrink * scratch["total"][of].reshape(rows, LANES) + tile.fold_lanes(weights)
            found = product(weights.astype(v.dtype), v, (1, 0))
            added = tile.wide(shrink, call.c) * scratch["sum"][of].reshape(rows, call.c) + found
            scratch["top"][of] = new_top.reshape(heads, block_q, LANES)
            scratch["total"][of] = total.reshape(heads, block_q, LANES)
            scratch["sum"][of] = added.reshape(heads, block_q, call.c)

        jax.lax.fori_loop(0, call.G // heads, visit_heads, None, unroll=True)

    when_each(visit.guards(known, b, i, j), call.switches, visit_keys)

    @pl.when(last)
    def _finish():
        for n in range(call.G):
            top = scratch["top"][n]
            total = jnp.broadcast_to(jnp.sum(scratch["total"][n], axis=1, keepdims=True), top.shape)
            # NaN, which a maximum may lose, counts as seen, and stays.
            seen = (top > MASKED / 2) | (total != total)
            safe = jnp.where(seen, total, 1.0)
            part = jnp.where(tile.wide(seen.astype(jnp.float32), call.c) > 0, scratch["sum"][n], 0.0)
            out_ref[0, 0, n] = (part / tile.wide(safe, call.c)).astype(out_ref.dtype)
            lse_ref[0, 0, n : n + 1] = jnp.where(seen, top + jnp.log(safe) * (1 / math.log(2)), UNSEEN).T[:1]


def _rows(x: Array, block_q: int) -> Array:
    """One row for each head [heads, n], for all its queries [heads * block_q, n]."""
    heads, n = x.shape
    return jnp.broadcast_to(x[:, None], (heads, block_q, n)).reshape(heads * block_q, n)
