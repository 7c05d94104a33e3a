"""The forward kernel: queries are gathered for each tile of region keys, and their sums scattered back.

Weights are powers 2^(x - reference) with a reference for each row that is known beforehand: the largest score of the
mean keys of the regions that it sees. Some product of a region is no less than that of its mean, so nothing vanishes
(what terms add at the mean may be above what they add at every key); and while no score is 100 above the reference in
log2, nothing overflows. Then neither a running maximum nor a correction of the sums is needed, which is a third of the
work of an item. `ok` of the caller checks the sums; where one is out of bounds, to either side, the kernel runs again
with `online`, a softmax with a running maximum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention.pallas_tpu.tile import (
    LANES,
    MASKED,
    UNSEEN,
    column,
    exponent,
    fold_lanes,
    product,
    wide,
)
from rave_jax.kernels.routed.pallas_tpu.lists import CUT, KEY_CODES, PLACE_BITS, WHOLE
from rave_jax.kernels.routed.pallas_tpu.terms import Sides, TermRows
from rave_jax.kernels.routed.pallas_tpu.walk import (
    CODES,
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


def forward(
    q: Float[Array, "B K T rows h"],
    reference: Float[Array, "B K lines lanes"],
    k: Float[Array, "B K tiles lanes h"],
    v: Float[Array, "B K tiles lanes h"],
    codes_q: Int[Array, "B blocks 1 codes"],
    codes_k: Int[Array, "B tiles eight lanes"],
    lists: Int[Array, "entries"],
    info: Int[Array, "B K blocks 1 words"],
    rows: TermRows,
    call: Call,
    *,
    online: bool,
) -> tuple[Float[Array, "B K T rows h"], Float[Array, "B K lines lanes"]]:
    """Output, and log-sum-exp in log2 with UNSEEN for rows that saw nothing, of each row of each query.

    Args:
        q: heads of a query in its rows.
        reference: of each row, in log2; not read if `online`.
        k, v: by tile.
        codes_q: lo, hi and open_q of each super-block's queries, one after the other.
        codes_k: bit of the key's region, order, open_k; then zeros.
        lists, info: of `lists.work`, the lists as one.
        rows: of `RowTerms`, of queries and of keys by tile; none without terms.
        call: sizes.
        online: keep a running maximum.
    """
    B, K, specs = call.B, call.K, block_specs(call, info.shape[-1])
    of_lines = pl.BlockSpec((None, None, call.lines, LANES), lambda b, g, i: (b, g, i, 0))
    scratch = {
        "given": pltpu.VMEM((2 * call.places, LANES), jnp.float32),
        "made": pltpu.VMEM((2 * call.places, LANES), jnp.float32),
        **list_scratch(call),
    }
    run = pl.pallas_call(
        functools.partial(_kernel, call=call, online=online, names=tuple(scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(B, K, call.blocks),
            in_specs=(
                specs.words,
                specs.codes,
                specs.lists,
                specs.queries,
                of_lines,
                specs.keys_once,
                specs.keys_once,
                specs.codes_k,
                *((specs.rows_q, specs.rows_k_once) if rows else ()),
            ),
            out_specs=(specs.queries, of_lines),
            scratch_shapes=tuple(scratch.values()),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((B, K, call.T, call.rows, LANES), q.dtype),
            jax.ShapeDtypeStruct((B, K, call.T * call.rows // LANES, LANES), jnp.float32),
        ),
        compiler_params=compiler_params(),
        interpret=call.interpret,
        name="routed_forward",
    )
    return run(info, codes_q, lists, q, reference, k, v, codes_k, *rows)


def _kernel(info, codes_q, lists, q, reference, k, v, codes_k, *refs, call: Call, online: bool, names):
    of_terms, refs = (refs[:2], refs[2:]) if call.terms else ((), refs)
    out, lse, *scratch = refs
    held = dict(zip(names, scratch, strict=True))
    given, made = held["given"], held["made"]
    rows, per_line = call.rows, LANES // call.rows
    pair = 2 * rows
    dtype, chunk = jnp.dtype(call.dtype), call.chunks[0]

    def line_at(line: Any, j: int) -> Any:
        return pl.multiple_of((line * per_line + j) * pair, pair)

    def start(line: Any, _: None) -> None:
        # One number a row, from a line across the lanes to every lane of its row.
        tops = column(reference[pl.ds(line, 1)])
        for j in range(per_line):
            at = line_at(line, j)
            given[pl.ds(at, rows)] = q[line * per_line + j].astype(jnp.float32)
            own = jnp.full((rows, LANES), MASKED) if online else tops[j * rows : (j + 1) * rows]
            given[pl.ds(at + rows, rows)] = own
            made[pl.ds(at, pair)] = jnp.zeros((pair, LANES), jnp.float32)

    each_line(call, start)
    spare = call.queries * pair
    for ref in (given, made):
        ref[pl.ds(spare, pair)] = jnp.zeros((pair, LANES), jnp.float32)

    def visit(tile: Any, entries: Sequence[Any], kind: int, words: Words) -> None:
        at = places(entries, kind)
        # Of each key its bit, and what the mask codes of a CUT visit ask, in every row of a query.
        keys = [jnp.broadcast_to(codes_k[tile, n : n + 1], (rows, call.tiling.lanes)) for n in range(KEY_CODES[kind])]

        def begin(number: int) -> Any:
            mine = slice(number * chunk, (number + 1) * chunk)
            x = product(gathered(given, at[mine], rows).astype(dtype), k[tile], (1, 1))
            dot, x = exponent(x, call.scale, call.terms.reads_dot)
            if of_terms:
                rows_q, rows_k = of_terms
                sides = Sides(call.terms, rows_at(rows_q, entries[mine], call), rows_k[tile], False, dtype)
                x = x + sides.shift(dot)
            if kind != WHOLE:
                seen = [_seen(keys, codes_q, x, kind, call, words) for x in entries[mine]]
                parts = [jnp.where(there, x[n * rows : (n + 1) * rows], MASKED) for n, there in enumerate(seen)]
                x = jnp.concatenate(parts, axis=0)
            return at[mine], x

        def weigh(begun: Any) -> Any:
            mine, x = begun
            top = gathered(given, mine, rows, rows)
            if not online:
                weights = jnp.exp2(x - wide(top, call.tiling.lanes))
                return mine, None, fold_lanes(weights), weights.astype(dtype)
            new = jnp.maximum(top, jnp.max(x, axis=1, keepdims=True))
            for n, place in enumerate(mine):
                given[tile_at(place, rows, rows)] = new[n * rows : (n + 1) * rows]
            # A row that has seen nothing yet has MASKED as its maximum, and masked keys must not count in it.
            shown = jnp.where(x > MASKED / 2, jnp.exp2(x - wide(new, call.tiling.lanes)), 0.0)
            return mine, jnp.exp2(top - new), fold_lanes(shown), shown.astype(dtype)

        def end(weighed: Any) -> None:
            mine, shrink, total, weights = weighed
            part = product(weights, v[tile], (1, 0))
            old = [(made[tile_at(place, rows)], made[tile_at(place, rows, rows)]) for place in mine]
            for n, place in enumerate(mine):
                own = slice(n * rows, (n + 1) * rows)
                before, summed = old[n]
                if shrink is not None:
                    before, summed = before * shrink[own], summed * shrink[own]
                made[tile_at(place, rows)] = before + total[own]
                made[tile_at(place, rows, rows)] = summed + part[own]

        in_turn(len(entries) // chunk, begin, weigh, end)

    walk(call, info, lists, held["buffer"], held["copied"], visit, brisk=not online)

    def finish(line: Any, _: None) -> None:
        tops, totals = [], []
        for j in range(per_line):
            at = line_at(line, j)
            total = jnp.sum(made[pl.ds(at, rows)], axis=1, keepdims=True)
            total = jnp.broadcast_to(total, (rows, LANES))
            safe = jnp.where(total > 0, total, 1.0)
            out[line * per_line + j] = (made[pl.ds(at + rows, rows)] / safe).astype(out.dtype)
            tops.append(given[pl.ds(at + rows, rows)])
            totals.append(total)
        top, total = jnp.concatenate(tops, axis=0), jnp.concatenate(totals, axis=0)
        # Sums that are no numbers stay what they are: `ok` looks at them.
        found = jnp.where(total == 0, UNSEEN, top + jnp.log(total) * (1 / math.log(2)))
        lse[pl.ds(line, 1)] = found.T[:1]

    each_line(call, finish)


def _seen(keys: Sequence[Array], codes_q: Any, entry: Any, kind: int, call: Call, words: Words) -> Array:
    """Which lanes of a tile the rows of the entry's query see, [rows, lanes]."""
    mine = call.words.rows_of(words(entry), call.tiling.lanes) if call.choices > 1 else entry >> PLACE_BITS
    open_ = (keys[0] & mine) != 0
    if kind != CUT:
        return open_
    number = number_of(entry, call)
    lo, hi, open_q = (codes_q[0, n * call.queries + number] for n in range(CODES))
    return open_ & (((lo <= keys[1]) & (keys[1] <= hi)) | (open_q == keys[2]))
