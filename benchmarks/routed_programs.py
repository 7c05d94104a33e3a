"""The kernels of routed attention as `compile_cases` takes them, with a number of work items known beforehand.

One kv group, heads of 128, bfloat16, one super-block of queries. What runs reads from the lists how many items a tile
has, which an estimate cannot know; here every tile has the same number, and what an item costs is the difference of two
programs.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from pallas_calls import Captured, captured

from rave_jax.attention.rave_forms import LogGate
from rave_jax.kernels.attention import Term, Terms
from rave_jax.kernels.attention.pallas_tpu.tile import LANES
from rave_jax.kernels.routed.pallas_tpu.backward import backward
from rave_jax.kernels.routed.pallas_tpu.forward import forward
from rave_jax.kernels.routed.pallas_tpu.lists import Tiling
from rave_jax.kernels.routed.pallas_tpu.terms import RowTerms
from rave_jax.kernels.routed.pallas_tpu.walk import CODES, Call

TILES = 2
RANK = 16


def program(
    place: Any,
    *,
    which: str,
    lanes: int,
    queries: int,
    item: int,
    together: int,
    chunk: int,
    items: int,
    kind: int = 0,
    heads_apart: bool = False,
    shared: int = 1,
    heads: int = 8,
    gate: bool = False,
    online: bool = False,
) -> tuple[Any, tuple[Any, ...]]:
    """The forward or the backward kernel over `TILES` tiles of so many items each, of regions that share a tile; `gate`
    as in `terms_of`."""
    tiling = Tiling(TILES * shared, lanes // shared, lanes)
    call = Call(
        B=1,
        K=1,
        G=heads,
        T=queries,
        tiling=tiling,
        queries=queries,
        item=item,
        together=together,
        chunks=(chunk, chunk),
        scale=LANES**-0.5,
        dtype="bfloat16",
        interpret=False,
        choices=heads if heads_apart else 1,
        terms=terms_of(gate),
        fixed=(TILES, items, kind),
    )
    half, i32, f32 = jnp.bfloat16, jnp.int32, jnp.float32
    q = place((1, 1, queries, call.rows, LANES), half)
    kv = place((1, 1, TILES, lanes, LANES), half)
    ints = (
        place((1, 1, 1, CODES * queries), i32),
        place((1, TILES, 8, lanes), i32),
        place((TILES * call.record,), i32),
        place((1, 1, 1, 1, LANES), i32),
    )
    rows = (place(q.shape, f32), place(kv.shape, f32)) if gate else ()
    if which == "forward":
        given = q, place((1, 1, queries * call.rows // LANES, LANES), f32), kv, kv, *ints
        made = captured(lambda *args: forward(*args[:8], args[8:], call, online=online), *given, *rows)
    else:
        given = q, kv, kv, q, place((1, 1, 2 * queries, LANES), f32), *ints
        made = captured(lambda *args: backward(*args[:9], args[9:], call), *given, *rows)
    return _alone(made, place)


def terms_of(gate: bool) -> RowTerms:
    """RAVE's log gate of rank 16 with both terms, or nothing."""
    if not gate:
        return RowTerms(())
    side = jnp.zeros((1, 1, 1, RANK + 2))
    return RowTerms.of(Terms((Term(LogGate(), side, side),)), "bfloat16")


def _alone(made: Captured, place: Any) -> tuple[Any, tuple[Any, ...]]:
    """The call with nothing before it: what XLA makes it may keep on the chip, and then there is no estimate."""
    run = pl.pallas_call(made.kernel, grid_spec=made.grid_spec, out_shape=made.out_shape, **made.settings)
    return run, tuple(place(x.shape, x.dtype) for x in made.args)
