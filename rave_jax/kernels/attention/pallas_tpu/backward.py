"""The backward kernel: one pass over all pairs of blocks gives the gradients of queries and keys alike.

As in the forward pass a block of queries stays and blocks of keys pass by. The queries' gradients are summed in scratch
memory for the block, the keys' for the whole row: the query heads of one kv head share its keys, so that is h + c
numbers a key and not a copy for each block of queries. A score is made once for both.

    dS = P * (dO v^T - rowsum(dO * O) + dlse)        dz' = dS * d bias / dz'
    dq = scale dS k     dk^T = scale q^T dS     dv^T = dO^T P     dU^T = W dz'^T     dW = U dz'

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
from rave_jax.kernels.attention.pallas_tpu.blocks import when_each
from rave_jax.kernels.attention.pallas_tpu.operands import SUBLANES, Call, Codes, Packed, pad
from rave_jax.kernels.attention.pallas_tpu.specs import Inputs, compiler_params, cost, input_specs
from rave_jax.kernels.attention.pallas_tpu.tile import LANES
from rave_jax.typing import Array, Float, Int


class Output(NamedTuple):
    """An output: its array and its block."""

    array: jax.ShapeDtypeStruct
    block: pl.BlockSpec


def backward(
    packed: Packed,
    codes: Codes,
    facts: tuple[Int[Array, "n"], Int[Array, "m"]],
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

    def at(b, n, i, j, facts_q, facts_k):
        return b, n, i, visit.key_block(facts_q, b, i, j)

    specs = input_specs(call, block_q, block_k, at, "d_out", "lse", "delta")
    inputs = specs.arrays(packed, codes, d_out=d_out, lse=lse, delta=delta)
    outputs, scratch = _outputs(call, packed), _scratch(call)
    run = pl.pallas_call(
        functools.partial(
            _kernel,
            call=call,
            visit=visit,
            names=specs.names,
            output_names=tuple(outputs),
            scratch_names=tuple(scratch),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=specs.blocks,
            out_specs=tuple(x.block for x in outputs.values()),
            scratch_shapes=tuple(scratch.values()),
        ),
        out_shape=tuple(x.array for x in outputs.values()),
        compiler_params=compiler_params(in_turn=2),
        cost_estimate=cost(call, grid, inputs, specs, [x.array for x in outputs.values()], products=5, gate_products=3),
        interpret=call.interpret,
        name="attention_backward",
    )
    found = dict(zip(outputs, run(*facts, *inputs), strict=True))
    return _gathered(found, packed, call)


def _outputs(call: Call, packed: Packed) -> dict[str, Output]:
    block_q, block_k = call.backward
    B, K, G, Gp = call.B, call.K, call.G, call.padded_group
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
            jax.ShapeDtypeStruct((B, K, G, call.T, call.h), packed.q.dtype),
            pl.BlockSpec((1, 1, G, block_q, call.h), lambda b, n, i, j, *_: (b, n, 0, i, 0)),
        ),
        "k": of_key_vectors(call.h, packed.k.dtype),
        "v": of_key_vectors(call.c, packed.v.dtype),
    }
    if call.r is not None:
        found |= {"u": of_queries(G, call.r), "rows": of_queries(Gp)}
        found |= {"w": of_keys(call.r, jnp.float32), "keys": of_keys(SUBLANES, jnp.float32)}
    if call.has_gain:
        found["gain"] = of_queries(Gp)
    if call.key_bias:
        found["key_bias"] = of_keys(Gp, jnp.float32)
    return found


def _scratch(call: Call) -> dict[str, Any]:
    block_q, block_k = call.backward
    G, dtype = call.G, call.dtype
    found = {
        "bounds": pltpu.VMEM((3, block_q, LANES), jnp.int32),
        "lse": pltpu.VMEM((G, block_q, LANES), jnp.float32),
        "delta": pltpu.VMEM((G, block_q, LANES), jnp.float32),
        "mask": pltpu.VMEM((block_q, block_k), jnp.float32),
        "q": pltpu.VMEM((G, call.h, block_q), dtype),
        "d_out": pltpu.VMEM((G, call.c, block_q), dtype),
        "d_q": pltpu.VMEM((G, block_q, call.h + (call.channel_lanes if call.folded else 0)), jnp.float32),
        "d_k": pltpu.VMEM((call.S // block_k, call.h, block_k), jnp.float32),
        "d_v": pltpu.VMEM((call.S // block_k, call.c, block_k), jnp.float32),
    }
    if call.r is not None:
        found |= {
            "U": pltpu.VMEM((G, block_q, call.channel_lanes), dtype),
            "U_rows": pltpu.VMEM((G, call.rounded_channels, block_q), dtype),
            "d_U": pltpu.VMEM((G, call.rounded_channels, block_q), jnp.float32),
            "d_W": pltpu.VMEM((call.S // block_k, call.rounded_channels, block_k), jnp.float32),
        }
    if call.has_gain:
        found |= {"gain": pltpu.VMEM((G, block_q, LANES), jnp.float32)}
        found |= {"d_gain": pltpu.VMEM((G, block_q, LANES), jnp.float32)}
    if call.key_bias:
        found["d_key_bias"] = pltpu.VMEM((call.S // block_k, call.padded_group, block_k), jnp.float32)
    return found


def _kernel(
    facts_q,
    facts_k,
    *refs,
    call: Call,
    visit: Any,
    names: tuple[str, ...],
    output_names: tuple[str, ...],
    scratch_names: tuple[str, ...],
):
    inputs = Inputs(dict(zip(names, refs, strict=False)))
    refs = refs[len(names) :]
    outputs = dict(zip(output_names, refs, strict=False))
    scratch = dict(zip(scratch_names, refs[len(output_names) :], strict=True))
    b, kv_head, i, j = (pl.program_id(n) for n in range(4))
    last_q, last_k = i == pl.num_programs(2) - 1, j == pl.num_programs(3) - 1
    block_q, block_k = call.backward
    dtype = jnp.dtype(call.dtype)
    product = functools.partial(tile.product, interpreted=bool(call.interpret))
    z_scale = call.scale if call.folded else 1.0
    of_queries = [name for name in ("d_q", "d_U", "d_gain") if name in scratch]
    of_keys = [name for name in ("d_k", "d_v", "d_W", "d_key_bias") if name in scratch]

    @pl.when(j == 0)
    def _start_queries():
        for name in of_queries:
            scratch[name][...] = jnp.zeros(scratch[name].shape, jnp.float32)
        inputs.keep_queries(scratch, kv_head, call)

    @pl.when(i == 0)
    def _start_keys():
        for name in of_keys:
            scratch[name][j] = jnp.zeros(scratch[name].shape[1:], jnp.float32)

    def visit_keys(masked: bool, gated: bool) -> None:
        k, v = inputs.k(), inputs.v()
        W_rows: Any = inputs.key_channels() if gated else None
        W: Any = tile.channels(W_rows, "key", dtype) if gated else None
        if masked:
            lo, hi, open_q = (tile.wide(scratch["bounds"][n], block_k) for n in range(3))
            scratch["mask"][...] = tile.mask(lo, hi, open_q, inputs.order(), inputs.open_k())

        key_rows: Any = tile.rounded_rows(W_rows, dtype) if gated else None
        folded = gated and call.folded
        wide_k = tile.beside(k, W) if folded else k

        def visit_head(n: Any, _: None) -> None:
            q = inputs.query_head("q", n, 1)
            if folded:
                q = jnp.concatenate([q, scratch["U"][n]], axis=1)
            x = product(q, wide_k, (1, 1)) * (call.scale * tile.LOG2E)
            if call.key_bias:
                x = x + inputs.key_bias(n, 1)
            slope: Any = None
            if gated and not folded:
                z = product(scratch["U"][n][:, : call.split_channels], W.astype(dtype), (1, 0))
                gain = tile.wide(scratch["gain"][n], block_k) if call.has_gain else None
                slope = tile.gate_slope(z, call.form, gain, exact=dtype == jnp.float32)
                x = x if slope.shift is None else x + slope.shift
            if masked:
                x = x + scratch["mask"][...]
            weights = jnp.exp2(x - tile.wide(scratch["lse"][n], block_k))
            if slope is not None and slope.factor is not None:
                weights = weights * slope.factor
            d_weights = product(inputs.query_head("d_out", n, 1), v, (1, 1))
            d_scores = weights * (d_weights - tile.wide(scratch["delta"][n], block_k))
            scratch["d_v"][j] += product(scratch["d_out"][n], weights.astype(dtype), (1, 0))
            d_dots = d_scores.astype(dtype)
            scratch["d_k"][j] += product(scratch["q"][n], d_dots, (1, 0))
            if call.key_bias:
                scratch["d_key_bias"][j, pl.ds(n, 1)] += jnp.sum(d_scores, axis=0, keepdims=True)
            width = wide_k.shape[1]
            scratch["d_q"][n, :, :width] += product(d_dots, wide_k, (1, 0))
            if gated:
                d_z = d_dots
                if not folded:
                    d_z = (d_scores * slope.of_z).astype(dtype)
                    scratch["d_U"][n] += product(key_rows, d_z, (1, 1))
                scratch["d_W"][j] += product(scratch["U_rows"][n], d_z, (1, 0))
                if slope is not None and slope.of_gain is not None:
                    scratch["d_gain"][n] += tile.fold_lanes(d_scores * slope.of_gain)

        jax.lax.fori_loop(0, call.G, visit_head, None, unroll=True)

    when_each(visit.guards(facts_q, facts_k, b, i, j), call.r is not None, visit_keys)

    @pl.when(last_k)
    def _finish_queries():
        for n in range(call.G):
            outputs["q"][0, 0, n] = (scratch["d_q"][n, :, : call.h] * call.scale).astype(outputs["q"].dtype)
            if call.folded:
                found = scratch["d_q"][n, :, call.h :].T
                scratch["d_U"][n, : call.channels] = tile.met(found, call.channels, split=dtype != jnp.float32)
            if call.r is not None:
                d_U = scratch["d_U"][n] * z_scale
                outputs["u"][0, 0, n] = d_U[: call.r] * inputs.switch(n, call)
                outputs["rows"][0, 0, n : n + 1] = d_U[call.r : call.r + 1]
            if call.has_gain:
                whole = jnp.sum(scratch["d_gain"][n], axis=1, keepdims=True)
                outputs["gain"][0, 0, n : n + 1] = jnp.broadcast_to(whole, (block_q, LANES)).T[:1]

    @pl.when(last_q)
    def _finish_keys():
        outputs["k"][0, 0] = (scratch["d_k"][j].T * call.scale).astype(outputs["k"].dtype)
        outputs["v"][0, 0] = scratch["d_v"][j].T.astype(outputs["v"].dtype)
        if call.r is not None:
            d_W = scratch["d_W"][j] * z_scale
            outputs["w"][0, 0] = d_W[: call.r]
            outputs["keys"][0, 0] = d_W[call.r : call.channels]
        if call.key_bias:
            outputs["key_bias"][0, 0] = scratch["d_key_bias"][j]


def _gathered(found: dict[str, Array], packed: Packed, call: Call) -> Packed:
    """The kernel's outputs as gradients of the packed operands; what is padding or a switch has none."""
    grads = Packed(*(found[name] for name in ("q", "k", "v")))
    if call.r is not None:
        assert packed.rows is not None
        # Rows of the padding were never written.
        d_rows = pad(found["rows"][:, :, : call.G], 2, packed.rows.shape[2])
        grads = grads._replace(u=found["u"], rows=d_rows, w=found["w"], keys=found["keys"])
    if call.has_gain:
        grads = grads._replace(gain=found["gain"][:, :, : call.G].sum((0, 3)))
    if call.key_bias:
        grads = grads._replace(key_bias=found["key_bias"] * (1 / tile.LOG2E))
    return grads
