"""The backward kernel: one pass over the work items gives the gradients of queries and keys alike.

Scores are made with keys in the rows and gathered queries in the lanes. A number of each row of a query (its
log-sum-exp, its delta) is then a number of a lane, and 16 queries' numbers are one line: each query has its own kept 16
times side by side, so that a line is put together by choosing lanes. Of the products only that of the queries' gradient
needs its left side turned.

    dS = P * (dO v^T - rowsum(dO * O) + dlse)        dq = scale dS k     dk = scale dS^T q     dv = P^T dO
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention.pallas_tpu.tile import LANES, MASKED, UNSEEN, column, exponent, product, wide
from rave_jax.kernels.routed.pallas_tpu.lists import CUT, KEY_CODES, PLACE_BITS, WHOLE
from rave_jax.kernels.routed.pallas_tpu.terms import AddedByAll, Sides, TermRows
from rave_jax.kernels.routed.pallas_tpu.walk import (
    CODES,
    ROWS,
    Call,
    Words,
    block_specs,
    compiler_params,
    each_line,
    gathered,
    in_turn,
    list_scratch,
    number_of,
    places,
    rows_at,
    tile_at,
    walk,
)
from rave_jax.typing import Array, Float, Int


def numbers_of(
    lse: Float[Array, "B K T rows"], delta: Float[Array, "B K T rows"], call: Call
) -> Float[Array, "B K 2*T lanes"]:
    """What the kernel reads of each row: two lines for each query, each number repeated along the lanes.

    Args:
        lse: of the forward pass, in log2, UNSEEN where a row saw nothing.
        delta: rowsum(d_out * out) - d_lse, d_lse of the natural log-sum-exp.
        call: sizes.
    """
    numbers = jnp.stack([jnp.tile(x, LANES // call.rows) for x in (lse, delta)], axis=3)
    return numbers.reshape(call.B, call.K, 2 * call.T, LANES)


def backward(
    q: Float[Array, "B K T rows h"],
    k: Float[Array, "B K tiles lanes h"],
    v: Float[Array, "B K tiles lanes h"],
    d_out: Float[Array, "B K T rows h"],
    numbers: Float[Array, "B K 2*T lanes"],
    codes_q: Int[Array, "B blocks 1 codes"],
    codes_k: Int[Array, "B tiles eight lanes"],
    lists: Int[Array, "entries"],
    info: Int[Array, "B K blocks 1 words"],
    rows: TermRows,
    call: Call,
) -> tuple[Array, ...]:
    """Gradients of q, k and v, and of the terms' rows where there are any.

    Args:
        q, k, v, codes_q, codes_k, lists, info, rows, call: as in the forward pass.
        d_out: gradient of the output.
        numbers: of `numbers_of`.
    """
    specs = block_specs(call, info.shape[-1])
    tiles = (call.tiling.tiles, call.tiling.lanes, LANES)
    scratch = {
        "given": pltpu.VMEM((2 * call.places, LANES), jnp.float32),
        "numbers": pltpu.VMEM((2 * call.queries + 8, LANES), jnp.float32),
        "d_q": pltpu.VMEM((call.places, LANES), jnp.float32),
        "d_k": pltpu.VMEM(tiles, jnp.float32),
        "d_v": pltpu.VMEM(tiles, jnp.float32),
        **list_scratch(call),
    }
    run = pl.pallas_call(
        functools.partial(_kernel, call=call, names=tuple(scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(call.B, call.K, call.blocks),
            in_specs=(
                specs.words,
                specs.codes,
                specs.lists,
                specs.queries,
                specs.queries,
                pl.BlockSpec((None, None, 2 * call.queries, LANES), lambda b, g, i: (b, g, i, 0)),
                specs.keys_once,
                specs.keys_once,
                specs.codes_k,
                *((specs.rows_q, specs.rows_k_once) if rows else ()),
            ),
            out_specs=(specs.queries, specs.keys, specs.keys, *((specs.rows_q, specs.rows_k) if rows else ())),
            scratch_shapes=tuple(scratch.values()),
        ),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, *rows)),
        compiler_params=compiler_params(),
        interpret=call.interpret,
        name="routed_backward",
    )
    return run(info, codes_q, lists, q, d_out, numbers, k, v, codes_k, *rows)


def _kernel(info, codes_q, lists, q, d_out, numbers_in, k, v, codes_k, *refs, call: Call, names):
    of_terms = 2 if call.terms else 0
    rows_of, refs = refs[:of_terms], refs[of_terms:]
    (dq, dk, dv), refs = refs[:3], refs[3:]
    d_rows, scratch = refs[:of_terms], refs[of_terms:]
    held = dict(zip(names, scratch, strict=True))
    given, numbers, d_q, d_k, d_v = (held[name] for name in ("given", "numbers", "d_q", "d_k", "d_v"))
    rows, pair, per_line = call.rows, 2 * call.rows, LANES // call.rows
    dtype, chunk = jnp.dtype(call.dtype), call.chunks[1]
    i, last = pl.program_id(2), call.blocks - 1
    of_lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) // rows

    def start(line: Any, _: None) -> None:
        for j in range(per_line):
            number = line * per_line + j
            at = pl.multiple_of(number * pair, pair)
            given[pl.ds(at, rows)] = q[number].astype(jnp.float32)
            given[pl.ds(at + rows, rows)] = d_out[number].astype(jnp.float32)
            d_q[pl.ds(pl.multiple_of(number * rows, rows), rows)] = jnp.zeros((rows, LANES), jnp.float32)
            if d_rows:
                d_rows[0][number] = jnp.zeros((rows, call.terms.width), jnp.float32)
        at = pl.multiple_of(line * 2 * per_line, 2 * per_line)
        numbers[pl.ds(at, 2 * per_line)] = numbers_in[pl.ds(at, 2 * per_line)]

    each_line(call, start)
    given[pl.ds(call.queries * pair, pair)] = jnp.zeros((pair, LANES), jnp.float32)
    d_q[pl.ds(call.queries * rows, rows)] = jnp.zeros((rows, LANES), jnp.float32)
    # What fills an item up has seen nothing: its weights are 0.
    numbers[pl.ds(2 * call.queries, 8)] = jnp.full((8, LANES), UNSEEN, jnp.float32)

    @pl.when(i == 0)
    def _start_keys() -> None:
        def one(tile: Any, _: None) -> None:
            for ref in (d_k, d_v, *d_rows[1:]):
                ref[tile] = jnp.zeros(ref.shape[1:], jnp.float32)

        jax.lax.fori_loop(0, call.tiling.tiles, one, None)

    def line_of(values: Sequence[Any]) -> Array:
        """One value for each query of a line, across its lanes; lines side by side."""
        lines = []
        for first in range(0, len(values), per_line):
            line = values[first]
            for j in range(1, per_line):
                line = jnp.where(of_lane == j, values[first + j], line)
            lines.append(jnp.broadcast_to(line, (*jnp.shape(line)[:-1], LANES)) if jnp.ndim(line) else line)
        return lines[0] if len(lines) == 1 else jnp.concatenate(lines, axis=1)

    def visit(tile: Any, entries: Sequence[Any], kind: int, words: Words) -> None:
        two = places(entries, kind)
        at = [pl.multiple_of(x >> 1, ROWS) for x in two]
        sums: list[Any] = [0.0, 0.0, 0.0]
        # Once for all chunks: a turned line is dear.
        keys = [column(codes_k[tile, n : n + 1]) for n in range(KEY_CODES[kind])]

        def begin(number: int) -> Any:
            mine = slice(number * chunk, (number + 1) * chunk)
            own_q, own_d = (gathered(given, two[mine], rows, offset).astype(dtype) for offset in (0, rows))
            dot, x = exponent(product(k[tile], own_q, (1, 1)), call.scale, call.terms.reads_dot)
            sides = None
            if rows_of:
                sides = Sides(call.terms, rows_at(rows_of[0], entries[mine], call), rows_of[1][tile], True, dtype)
            return at[mine], entries[mine], own_q, own_d, x, product(v[tile], own_d, (1, 1)), dot, sides

        def weigh(begun: Any) -> Any:
            mine, listed, own_q, own_d, x, d_weights, dot, sides = begun
            added = AddedByAll(None, None, ()) if sides is None else sides.added(dot, exact=dtype == jnp.float32)
            x = x if added.shift is None else x + added.shift
            both = line_of([numbers[pl.ds(place >> (rows.bit_length() - 2), 2)] for place in mine])
            if kind != WHOLE:
                # Not the weights: the compiler's estimate dies where a choice goes straight into a product.
                x = jnp.where(_seen(keys, codes_q, listed, kind, call, words, line_of), x, MASKED)
            weights = jnp.exp2(x - both[0:1])
            weights = weights if added.factor is None else weights * added.factor
            d_scores = weights * (d_weights - both[1:2])
            fields = [slope(d_scores) for slope in added.slopes]
            d_dots = sum((of.dot for of in fields if of.dot is not None), d_scores)
            found = None if sides is None else sides.gradients(fields)
            return mine, listed, own_q, own_d, weights.astype(dtype), d_dots.astype(dtype), found

        def end(weighed: Any) -> None:
            mine, listed, own_q, own_d, weights, d_scores, of_rows = weighed
            sums[0] += product(d_scores, own_q, (1, 0))
            sums[1] += product(weights, own_d, (1, 0))
            part = product(d_scores, k[tile], (0, 0))
            old = [d_q[tile_at(place, rows)] for place in mine]
            for n, place in enumerate(mine):
                d_q[tile_at(place, rows)] = old[n] + part[n * rows : (n + 1) * rows]
            if not d_rows:
                return
            sums[2] += of_rows[1]
            # What fills an item up has no weight: it adds zeros to the last query's.
            for n, entry in enumerate(listed):
                d_rows[0][number_of(entry, call)] += of_rows[0][n * rows : (n + 1) * rows]

        in_turn(len(entries) // chunk, begin, weigh, end)
        d_k[tile] += sums[0]
        d_v[tile] += sums[1]
        if d_rows:
            d_rows[1][tile] += sums[2]

    walk(call, info, lists, held["buffer"], held["copied"], visit)

    def finish(line: Any, _: None) -> None:
        for j in range(per_line):
            number = line * per_line + j
            own = d_q[pl.ds(pl.multiple_of(number * rows, rows), rows)]
            dq[number] = (own * call.scale).astype(dq.dtype)

    each_line(call, finish)

    @pl.when(i == last)
    def _finish_keys() -> None:
        def one(tile: Any, _: None) -> None:
            dk[tile] = (d_k[tile] * call.scale).astype(dk.dtype)
            dv[tile] = d_v[tile].astype(dv.dtype)

        jax.lax.fori_loop(0, call.tiling.tiles, one, None)


def _seen(
    keys: Sequence[Array],
    codes_q: Any,
    entries: Sequence[Any],
    kind: int,
    call: Call,
    words: Words,
    line_of: Callable[[Sequence[Any]], Array],
) -> Array:
    """Which lanes of a tile, turned into rows, the entries' queries see, [lanes, queries * rows]."""
    zero = jnp.zeros((1, LANES), jnp.int32)
    if call.choices > 1:
        bits = call.words.lanes_of([words(x) for x in entries], line_of)
    else:
        bits = line_of([zero + (x >> PLACE_BITS) for x in entries])
    width = bits.shape[1]
    open_ = (wide(keys[0], width) & bits) != 0
    if kind != CUT:
        return open_
    numbers = [number_of(x, call) for x in entries]
    lo, hi, open_q = (line_of([zero + codes_q[0, n * call.queries + x] for x in numbers]) for n in range(CODES))
    order, open_k = wide(keys[1], width), wide(keys[2], width)
    return open_ & (((lo <= order) & (order <= hi)) | (open_q == open_k))
