"""The backward kernel: one pass over all pairs of blocks gives the gradients of queries and keys alike.

As in the forward pass a block of queries stays and blocks of keys pass by. The queries' gradients are summed in scratch
memory for the block, the keys' for the whole row: the query heads of one kv head share its keys, so that is h + c
numbers a key and not a copy for each block of queries. A score is made once for both.

    dS = P * (dO v^T - rowsum(dO * O) + dlse)      dz = dS * d bias / dz, of every field z that a score function reads
    dq = scale (dS + ddot) k     dk^T = scale q^T (dS + ddot)     dv^T = dO^T P     dU^T = W dpair^T     dW = U dpair

Products whose result is long in keys are written the way that streams their few channels past a tile that stays in the
matrix unit: dU and dW then cost a fraction of a product of the tile's size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention.pallas_tpu import tile
from rave_jax.kernels.attention.pallas_tpu.added import backward_scratch, parts_of
from rave_jax.kernels.attention.pallas_tpu.blocks import when_each
from rave_jax.kernels.attention.pallas_tpu.operands import Call, Codes, Packed, kind
from rave_jax.kernels.attention.pallas_tpu.padding import pad
from rave_jax.kernels.attention.pallas_tpu.specs import Inputs, compiler_params, cost, input_specs
from rave_jax.kernels.attention.pallas_tpu.tile import LANES
from rave_jax.kernels.attention.pallas_tpu.traced import of_pair
from rave_jax.typing import Array, Float, Int

OF_KEYS = ("d_k", "d_v", "d_W", "d_keys", "d_key_bias")
"""Kinds of sums that a block of keys has; the others belong to the block of queries."""


class Output(NamedTuple):
    """An output: its array and its block."""

    array: jax.ShapeDtypeStruct
    block: pl.BlockSpec


def backward(
    packed: Packed,
    codes: Codes,
    facts: tuple[Int[Array, "n"], ...],
    d_out: Float[Array, "B K G T c"],
    lse: Float[Array, "B K G T"],
    delta: Float[Array, "B K G T"],
    call: Call,
) -> Packed:
    """Gradients of the packed operands.

    Args:
        packed, codes, facts: as in the forward pass, `facts` for the backward blocks.
        d_out: gradient of the output.
        lse: log-sum-exp of the forward pass, in log2, UNSEEN where a row saw nothing.
        delta: rowsum(d_out * out) - d_lse, d_lse of the natural log-sum-exp.
    """
    block_q, block_k = call.backward
    grid = (call.B, call.K, call.T // block_q, call.S // block_k)
    visit = call.visit(grid[2], grid[3])

    def at(b, n, i, j, *facts):
        return b, n, i, visit.key_block(facts, b, i, j)

    specs = input_specs(call, block_q, block_k, at, "d_out", "lse", "delta")
    inputs = specs.arrays(packed, codes, d_out=d_out, lse=lse, delta=delta)
    outputs, scratch = _outputs(call, packed), _scratch(call)
    run = pl.pallas_call(
        functools.partial(
            _kernel,
            call=call,
            visit=visit,
            facts=len(facts),
            names=specs.names,
            output_names=tuple(outputs),
            scratch_names=tuple(scratch),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(facts),
            grid=grid,
            in_specs=specs.blocks,
            out_specs=tuple(x.block for x in outputs.values()),
            scratch_shapes=tuple(scratch.values()),
        ),
        out_shape=tuple(x.array for x in outputs.values()),
        compiler_params=compiler_params(in_turn=2),
        cost_estimate=cost(call, grid, inputs, specs, [x.array for x in outputs.values()], products=5, pair_products=3),
        interpret=call.interpret,
        name="attention_backward",
    )
    found = dict(zip(outputs, run(*facts, *inputs), strict=True))
    return _gathered(found, packed, call)


def _outputs(call: Call, packed: Packed) -> dict[str, Output]:
    block_q, block_k = call.backward
    B, K, G = call.B, call.K, call.G
    last = call.T // block_q - 1

    def of_queries(*rows: int) -> Output:
        zeros = (0,) * len(rows)
        block = pl.BlockSpec((1, 1, *rows, block_q), lambda b, n, i, j, *_: (b, n, *zeros, i))
        return Output(jax.ShapeDtypeStruct((B, K, *rows, call.T), jnp.float32), block)

    def of_keys(rows: int, dtype: Any) -> Output:
        # Written while the last block of queries is there; until then the block at hand does not change.
        block = pl.BlockSpec((1, 1, rows, block_k), lambda b, n, i, j, *_: (b, n, 0, jnp.where(i == last, j, 0)))
        return Output(jax.ShapeDtypeStruct((B, K, rows, call.S), dtype), block)

    def of_key_vectors(width: int, dtype: Any) -> Output:
        block = pl.BlockSpec((1, 1, block_k, width), lambda b, n, i, j, *_: (b, n, jnp.where(i == last, j, 0), 0))
        return Output(jax.ShapeDtypeStruct((B, K, call.S, width), dtype), block)

    found = {
        "q": Output(
            jax.ShapeDtypeStruct((B, K, G, call.T, call.h), packed["q"].dtype),
            pl.BlockSpec((1, 1, G, block_q, call.h), lambda b, n, i, j, *_: (b, n, 0, i, 0)),
        ),
        "k": of_key_vectors(call.h, packed["k"].dtype),
        "v": of_key_vectors(call.c, packed["v"].dtype),
    }
    for n, term in enumerate(call.terms):
        if term.r is not None:
            found |= {f"u.{n}": of_queries(G, term.r), f"w.{n}": of_keys(term.r, jnp.float32)}
        for side, names in (("rows", term.shape.query), ("heads", term.shape.head)):
            if names:
                found[f"{side}.{n}"] = of_queries(len(names) * G)
        if term.shape.key:
            found[f"keys.{n}"] = of_keys(len(term.shape.key), jnp.float32)
    if call.key_bias:
        found["key_bias"] = of_keys(call.padded_group, jnp.float32)
    return found


def _scratch(call: Call) -> dict[str, Any]:
    block_q, block_k = call.backward
    G, dtype = call.G, call.dtype
    width = call.h + (0 if call.folded is None else call.folded.channel_lanes)
    found = {
        "bounds": pltpu.VMEM((3, block_q, LANES), jnp.int32),
        "lse": pltpu.VMEM((G, block_q, LANES), jnp.float32),
        "delta": pltpu.VMEM((G, block_q, LANES), jnp.float32),
        "mask": pltpu.VMEM((block_q, block_k), jnp.float32),
        "q": pltpu.VMEM((G, call.h, block_q), dtype),
        "d_out": pltpu.VMEM((G, call.c, block_q), dtype),
        "d_q": pltpu.VMEM((G, block_q, width), jnp.float32),
        "d_k": pltpu.VMEM((call.S // block_k, call.h, block_k), jnp.float32),
        "d_v": pltpu.VMEM((call.S // block_k, call.c, block_k), jnp.float32),
    }
    found |= backward_scratch(call, block_q, block_k)
    if call.key_bias:
        found["d_key_bias"] = pltpu.VMEM((call.S // block_k, call.padded_group, block_k), jnp.float32)
    return found


def _kernel(
    *refs,
    call: Call,
    visit: Any,
    facts: int,
    names: tuple[str, ...],
    output_names: tuple[str, ...],
    scratch_names: tuple[str, ...],
):
    known, refs = refs[:facts], refs[facts:]
    inputs = Inputs(dict(zip(names, refs, strict=False)))
    refs = refs[len(names) :]
    outputs = dict(zip(output_names, refs, strict=False))
    scratch = dict(zip(scratch_names, refs[len(output_names) :], strict=True))
    b, kv_head, i, j = (pl.program_id(n) for n in range(4))
    last_q, last_k = i == pl.num_programs(2) - 1, j == pl.num_programs(3) - 1
    block_k = call.backward[1]
    dtype = jnp.dtype(call.dtype)
    product = functools.partial(tile.product, interpreted=bool(call.interpret))
    parts = parts_of(call, inputs, scratch)
    sums = [name for name in scratch if name.startswith("d_") and name != "d_out"]
    of_keys = [name for name in sums if kind(name) in OF_KEYS]
    of_queries = [name for name in sums if name not in of_keys]

    @pl.when(j == 0)
    def _start_queries():
        for name in of_queries:
            scratch[name][...] = jnp.zeros(scratch[name].shape, jnp.float32)
        inputs.keep_queries(scratch, call)
        for part in parts:
            part.keep_queries(kv_head)

    @pl.when(i == 0)
    def _start_keys():
        for name in of_keys:
            scratch[name][j] = jnp.zeros(scratch[name].shape[1:], jnp.float32)

    def visit_keys(masked: bool, on: frozenset[int]) -> None:
        k, v = inputs.k(), inputs.v()
        active = [(part, part.keys()) for part in parts if part.active(on)]
        folded = next((part for part, _ in active if part.term.folded), None)
        reads_dot = any(part.term.reads_dot for part, _ in active)
        if masked:
            lo, hi, open_q = (tile.wide(scratch["bounds"][n], block_k) for n in range(3))
            scratch["mask"][...] = tile.mask(lo, hi, open_q, inputs.order(), inputs.open_k())
        wide_k = k
        for part, keys in active:
            if part is folded:
                wide_k = tile.beside(k, keys.W)

        def visit_head(n: Any, _: None) -> None:
            q = inputs.query_head("q", n, 1)
            if folded is not None:
                q = jnp.concatenate([q, folded.of_queries(n, 1)], axis=1)
            dot, x = tile.exponent(product(q, wide_k, (1, 1)), call.scale, reads_dot)
            if call.key_bias:
                x = x + inputs.key_bias(n, 1)
            factor, added = None, []
            for part, keys in active:
                if part is folded:
                    continue
                given = dot if part.term.reads_dot else None
                found = part.added(given, keys, n, x.shape, exact=dtype == jnp.float32)
                x = x if found.shift is None else x + found.shift
                if found.factor is not None:
                    factor = found.factor if factor is None else factor * found.factor
                added.append((part, keys, found.slopes))
            if masked:
                x = x + scratch["mask"][...]
            weights = jnp.exp2(x - tile.wide(scratch["lse"][n], block_k))
            if factor is not None:
                weights = weights * factor
            d_weights = product(inputs.query_head("d_out", n, 1), v, (1, 1))
            d_scores = weights * (d_weights - tile.wide(scratch["delta"][n], block_k))
            d_dots, of_reader = d_scores, None
            for part, _, slopes in added:
                if part.term.reads_dot:
                    of_reader = slopes(d_scores)
                    d_dots = d_dots + part.of_dot(of_reader)
            scratch["d_v"][j] += product(scratch["d_out"][n], weights.astype(dtype), (1, 0))
            d_dots = d_dots.astype(dtype)
            scratch["d_k"][j] += product(scratch["q"][n], d_dots, (1, 0))
            if call.key_bias:
                scratch["d_key_bias"][j, pl.ds(n, 1)] += jnp.sum(d_scores, axis=0, keepdims=True)
            width = wide_k.shape[1]
            scratch["d_q"][n, :, :width] += product(d_dots, wide_k, (1, 0))
            for part, keys, slopes in added:
                part.add_gradients(of_reader if part.term.reads_dot else slopes(d_scores), keys, n, j)
            for part, keys in active:
                if part is folded:
                    part.add_gradients(of_pair(d_dots), keys, n, j)

        jax.lax.fori_loop(0, call.G, visit_head, None, unroll=True)

    when_each(visit.guards(known, b, i, j), call.switches, visit_keys)

    @pl.when(last_k)
    def _finish_queries():
        for n in range(call.G):
            outputs["q"][0, 0, n] = (scratch["d_q"][n, :, : call.h] * call.scale).astype(outputs["q"].dtype)
            for part in parts:
                if part.term.folded:
                    found, channels = scratch["d_q"][n, :, call.h :].T, part.term.channels
                    part.kept("d_U")[n, :channels] = tile.met(found, channels, split=dtype != jnp.float32)
                part.write_queries(outputs, n)

    @pl.when(last_q)
    def _finish_keys():
        outputs["k"][0, 0] = (scratch["d_k"][j].T * call.scale).astype(outputs["k"].dtype)
        outputs["v"][0, 0] = scratch["d_v"][j].T.astype(outputs["v"].dtype)
        for part in parts:
            part.write_keys(outputs, j)
        if call.key_bias:
            outputs["key_bias"][0, 0] = scratch["d_key_bias"][j]


def _gathered(found: dict[str, Array], packed: Packed, call: Call) -> Packed:
    """The kernel's outputs as gradients of the packed operands; what is padding or a switch has none."""
    if call.key_bias:
        found = found | {"key_bias": found["key_bias"] * (1 / tile.LOG2E)}
    grads = {}
    for name, x in packed.items():
        if name not in found:
            grads[name] = jnp.zeros_like(x)
        elif kind(name) == "heads":
            grads[name] = found[name].sum((0, 3))
        elif kind(name) in ("rows", "keys"):
            grads[name] = pad(found[name], 2, x.shape[2])
        else:
            grads[name] = found[name]
    return grads
