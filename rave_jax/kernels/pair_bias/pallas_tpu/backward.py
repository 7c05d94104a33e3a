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

from rave_jax.kernels.pair_bias.pallas_tpu import tile
from rave_jax.kernels.pair_bias.pallas_tpu.blocks import when_each
from rave_jax.kernels.pair_bias.pallas_tpu.operands import SUBLANES, Call, Codes, Packed
from rave_jax.kernels.pair_bias.pallas_tpu.specs import Inputs, compiler_params, cost, input_specs
from rave_jax.kernels.pair_bias.pallas_tpu.tile import LANES
from rave_jax.typing import Array, Float, Int


class Output(NamedTuple):
    """An output: its array and its block."""

    array: jax.ShapeDtypeStruct
    block: pl.BlockSpec


def backward(
    packed: Packed,
    codes: Codes,
    facts: tuple[Int[Array, "n"], Int[Array, "m"]],
    d_out: Float[Array, "B K I G t c"],
    lse: Float[Array, "B K I G t"],
    delta: Float[Array, "B K I G t"],
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
        name="pair_bias_backward",
    )
    found = dict(zip(outputs, run(*facts, *inputs), strict=True))
    return _gathered(found, packed, call)


def _outputs(call: Call, packed: Packed) -> dict[str, Output]:
    block_q, block_k = call.backward
    B, K, G, Gp, t = call.B, call.K, call.G, call.padded_group, call.part_q
    parts, many, blocks_k = call.T // t, block_q // t, call.S // block_k
    last = call.T // block_q - 1

    def of_queries(shape: tuple[int, ...], dtype: Any) -> Output:
        zeros = (0,) * len(shape)
        block = pl.BlockSpec((1, 1, many, *shape), lambda b, n, i, j, *_: (b, n, i, *zeros))
        return Output(jax.ShapeDtypeStruct((B, K, parts, *shape), dtype), block)

    def of_keys(rows: int, dtype: Any) -> Output:
        # Written while the last block of queries is there; until then the block at hand does not change.
        block = pl.BlockSpec((1, 1, 1, rows, block_k), lambda b, n, i, j, *_: (b, n, jnp.where(i == last, j, 0), 0, 0))
        return Output(jax.ShapeDtypeStruct((B, K, blocks_k, rows, block_k), dtype), block)

    found = {
        "q": of_queries((G, t, call.h), packed.q.dtype),
        "k": of_keys(call.h, packed.k.dtype),
        "v": of_keys(call.c, packed.v.dtype),
    }
    if call.r is not None:
        found |= {"U": of_queries((G, call.channels, t), jnp.float32), "W": of_keys(call.channels, jnp.float32)}
    if call.has_gain:
        found["gain"] = of_queries((Gp, t), jnp.float32)
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
    t, dtype = call.part_q, jnp.dtype(call.dtype)
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
            x = tile.product(q, wide_k, (1, 1)) * (call.scale * tile.LOG2E)
            if call.key_bias:
                x = x + inputs.key_bias(n, 1)
            slope: Any = None
            if gated and not folded:
                z = tile.product(scratch["U"][n][:, : call.split_channels], W.astype(dtype), (1, 0))
                gain = tile.wide(scratch["gain"][n], block_k) if call.has_gain else None
                slope = tile.gate_slope(z, call.form, gain, exact=dtype == jnp.float32)
                x = x if slope.shift is None else x + slope.shift
            if masked:
                x = x + scratch["mask"][...]
            weights = jnp.exp2(x - tile.wide(scratch["lse"][n], block_k))
            if slope is not None and slope.factor is not None:
                weights = weights * slope.factor
            d_weights = tile.product(inputs.query_head("d_out", n, 1), v, (1, 1))
            d_scores = weights * (d_weights - tile.wide(scratch["delta"][n], block_k))
            scratch["d_v"][j] += tile.product(scratch["d_out"][n], weights.astype(dtype), (1, 0))
            d_dots = d_scores.astype(dtype)
            scratch["d_k"][j] += tile.product(scratch["q"][n], d_dots, (1, 0))
            if call.key_bias:
                scratch["d_key_bias"][j, pl.ds(n, 1)] += jnp.sum(d_scores, axis=0, keepdims=True)
            width = wide_k.shape[1]
            scratch["d_q"][n, :, :width] += tile.product(d_dots, wide_k, (1, 0))
            if gated:
                d_z = d_dots
                if not folded:
                    d_z = (d_scores * slope.of_z).astype(dtype)
                    scratch["d_U"][n] += tile.product(key_rows, d_z, (1, 1))
                scratch["d_W"][j] += tile.product(scratch["U_rows"][n], d_z, (1, 0))
                if slope is not None and slope.of_gain is not None:
                    scratch["d_gain"][n] += tile.fold_lanes(d_scores * slope.of_gain)

        jax.lax.fori_loop(0, call.G, visit_head, None, unroll=True)

    when_each(visit.guards(facts_q, facts_k, b, i, j), call.r is not None, visit_keys)

    @pl.when(last_k)
    def _finish_queries():
        for n in range(call.G):
            d_q = (scratch["d_q"][n, :, : call.h] * call.scale).astype(outputs["q"].dtype)
            outputs["q"][0, 0, :, n] = d_q.reshape(-1, t, call.h)
            if call.folded:
                found = scratch["d_q"][n, :, call.h :].T
                scratch["d_U"][n, : call.channels] = tile.met(found, call.channels, split=dtype != jnp.float32)
            for m in range(block_q // t):
                if "U" in outputs:
                    outputs["U"][0, 0, m, n] = scratch["d_U"][n][: call.channels, m * t : (m + 1) * t]
                if "gain" in outputs:
                    whole = jnp.sum(scratch["d_gain"][n], axis=1, keepdims=True)
                    row = jnp.broadcast_to(whole, (block_q, LANES)).T[:1]
                    outputs["gain"][0, 0, m, n : n + 1] = row[:, m * t : (m + 1) * t]

    @pl.when(last_q)
    def _finish_keys():
        outputs["k"][0, 0, 0] = (scratch["d_k"][j] * call.scale).astype(outputs["k"].dtype)
        outputs["v"][0, 0, 0] = scratch["d_v"][j].astype(outputs["v"].dtype)
        for name in ("W", "key_bias"):
            if name in outputs:
                rows = outputs[name].shape[3]
                outputs[name][0, 0, 0] = scratch["d_" + name][j][:rows]


def _gathered(found: dict[str, Array], packed: Packed, call: Call) -> Packed:
    """The kernel's outputs as gradients of the packed operands; what is padding or a switch has none."""

    def as_keys(x: Float[Array, "B K J n s"]) -> Float[Array, "B K S n"]:
        return jnp.swapaxes(x, 3, 4).reshape(*x.shape[:2], -1, x.shape[3])

    def as_parts(x: Float[Array, "B K J n s"]) -> Float[Array, "B K J n s"]:
        """From the backward kernel's blocks to the parts of the layout."""
        B, K, J, n, s = x.shape
        x = x.reshape(B, K, J, n, s // call.part_k, call.part_k)
        return jnp.moveaxis(x, 4, 3).reshape(B, K, -1, n, call.part_k)

    grads = Packed(found["q"], as_keys(found["k"]), as_keys(found["v"]))
    if call.r is not None:
        assert packed.rows is not None
        if call.folded:
            found |= {name: found[name] * call.scale for name in ("U", "W")}
        d_rows = jnp.zeros_like(packed.rows).at[:, :, :, : call.G].set(found["U"][:, :, :, :, call.r])
        d_W = as_parts(found["W"])
        grads = grads._replace(
            u=found["U"][:, :, :, :, : call.r], rows=d_rows, w=d_W[:, :, :, : call.r], keys=d_W[:, :, :, call.r :]
        )
        assert d_W.shape[3] == call.r + SUBLANES
    if call.has_gain:
        grads = grads._replace(gain=found["gain"][:, :, :, : call.G].sum((0, 2, 4)))
    if call.key_bias:
        grads = grads._replace(key_bias=as_parts(found["key_bias"]) * (1 / tile.LOG2E))
    return grads
