"""What both kernels share: the sizes of a call, and the walk over the work items of a super-block.

A grid step is a super-block of queries of one kv head. All that belongs to its queries lies in the chip's memory, one
tile of 8 rows (the query heads of the group) by 128 lanes for each query and array, so that gathering a query is one
load at an address from the list. Keys and values of all tiles are there too. The list of a tile is copied into scalar
memory while the tile before it is worked on.

The compiler does not know that the queries of a list differ, and keeps stores to what was gathered in their order
behind the loads. So an item is many queries, taken in chunks whose scores are begun before the weights of the chunk
before them are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.config import require
from rave_jax.kernels.attention.pallas_tpu.operands import up
from rave_jax.kernels.attention.pallas_tpu.tile import LANES
from rave_jax.kernels.routed.pallas_tpu.heads import HeadWords
from rave_jax.kernels.routed.pallas_tpu.lists import CUT, KIND_BITS, PLACE_BITS, SHARED, TILE_BITS, WHOLE, Tiling
from rave_jax.kernels.routed.pallas_tpu.terms import NO_TERMS, RowTerms
from rave_jax.typing import Array

ROWS = 8
"""Rows of a query are a multiple of this: a tile of the chip's memory."""
CODES = 3
"""Numbers of a query that a CUT visit reads: lo, hi, open_q."""
VMEM_LIMIT = 110 << 20
"""Bytes a kernel may use."""


@dataclass(frozen=True)
class ItemSizes:
    """How queries are taken."""

    queries: int = 2048
    """Of a super-block, at most: as many as fit beside the keys are taken."""
    item: int = 64
    """Of a work item."""
    together: int = 256
    """Of so many items as are taken as one while a list has them: a visit has a cost of its own beside its queries'."""
    chunks: tuple[int, int] = (16, 16)
    """Whose scores are made at once, in the forward and in the backward kernel."""
    wide: float = 0.65
    """Cost of 128 lanes in a tile of 256, which share a gathering, to that in one of 128."""
    vmem_bytes: int = 96 << 20
    """Of the chip's memory that a kernel may fill."""

    def __post_init__(self) -> None:
        require(self.queries % self.item == 0, "queries", self.queries, f"a multiple of {self.item}")
        for chunk in self.chunks:
            require(chunk > 0 and self.item % chunk == 0, "chunks", chunk, f"divisors of {self.item}")
        part = short_part(self.item, self.chunks)
        fits = self.item % part == 0 and all(part % chunk == 0 for chunk in self.chunks)
        require(fits, "chunks", self.chunks, f"divisors of {part}, and that a divisor of {self.item}")
        several, rest = divmod(self.together, self.item)
        doubled = rest == 0 and several > 0 and several & (several - 1) == 0
        require(doubled, "together", self.together, f"{self.item} times a power of two")


def short_part(item: int, chunks: tuple[int, int]) -> int:
    """Queries of an item that are taken together where programs are to be short."""
    return min(item, 2 * max(chunks))


@dataclass(frozen=True)
class Call:
    """All that is static of one call."""

    B: int
    K: int
    G: int
    T: int
    """Padded to whole super-blocks."""
    tiling: Tiling
    queries: int
    """Of a super-block."""
    item: int
    together: int
    chunks: tuple[int, int]
    scale: float
    dtype: str
    interpret: Any
    choices: int = 1
    """Of a query: one, or G where each head has its own."""
    terms: RowTerms = NO_TERMS
    """What is added to scores."""
    fixed: tuple[int, int, int] | None = None
    """(tiles, items of each, kind of each) instead of what the lists say: for estimates, which cannot know data."""

    @property
    def rows(self) -> int:
        """Of a query: its heads, up to a power of two of at least a tile, so that whole queries fill 128 lanes."""
        return max(ROWS, 1 << (self.G - 1).bit_length())

    @property
    def blocks(self) -> int:
        """Super-blocks of a row."""
        return self.T // self.queries

    @property
    def length(self) -> int:
        """Of a list: whole visits, and so long that records begin at whole lines of memory, as copies want it."""
        words = self.words.count * self.queries
        return up(words + up(self.queries, self.together), LANES) - words

    @property
    def words(self) -> HeadWords:
        """Of a query's heads, for each tile."""
        return HeadWords.of(self.choices, self.rows, self.tiling.sharing)

    def runs(self, items: Any) -> tuple[Any, Any]:
        """How many visits of `together` queries, and then of an item each, a list of so many items takes; a negative
        number is none. Three quarters of a visit are taken as one."""
        several = self.together // self.item
        # Not //, which asks for the sign.
        long = (items + several // 4) >> (several.bit_length() - 1)
        return long, items - long * several

    def common(self, kind: int) -> bool:
        """Is this what many visits are?"""
        masked = self.choices > 1
        return (kind == WHOLE and self.tiling.full > 0 and not masked) or (
            kind == SHARED and (self.tiling.rest > 0 or masked)
        )

    @property
    def record(self) -> int:
        """Numbers of a tile in the lists: the words of its queries' heads, and its list."""
        return self.words.count * self.queries + self.length

    @property
    def places(self) -> int:
        """Rows of an array that holds a tile of `rows` for each query, and one for what fills an item up."""
        return (self.queries + 1) * self.rows

    @property
    def lines(self) -> int:
        """Rows of 128 lanes that hold a number for each row of the super-block's queries."""
        return self.queries * self.rows // LANES


Words = Callable[[Any], list[Any]]
"""Of an entry, the words of its query's heads, scalars."""


class BlockSpecs(NamedTuple):
    """Of the operands that both kernels have, rows those of score terms; what is `once` is not copied while others are
    worked on."""

    words: pl.BlockSpec
    codes: pl.BlockSpec
    lists: pl.BlockSpec
    queries: pl.BlockSpec
    keys: pl.BlockSpec
    keys_once: pl.BlockSpec
    rows_q: pl.BlockSpec
    rows_k: pl.BlockSpec
    rows_k_once: pl.BlockSpec
    codes_k: pl.BlockSpec


def block_specs(call: Call, words: int) -> BlockSpecs:
    """For a grid of (row, kv head, super-block); `words` are those of a super-block."""
    n, tiles, lanes, smem = call.queries, call.tiling.tiles, call.tiling.lanes, pltpu.SMEM
    width = call.terms.width

    def of_queries(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, n, call.rows, width), lambda b, g, i: (b, g, i, 0, 0))

    def of_keys(width: int, *, once: bool) -> pl.BlockSpec:
        how = {"pipeline_mode": pl.Buffered(1)} if once else {}
        return pl.BlockSpec((None, None, tiles, lanes, width), lambda b, g, i: (b, g, 0, 0, 0), **how)

    return BlockSpecs(
        words=pl.BlockSpec((None, None, None, 1, words), lambda b, g, i: (b, g, i, 0, 0), memory_space=smem),
        codes=pl.BlockSpec((None, None, 1, CODES * n), lambda b, g, i: (b, i, 0, 0), memory_space=smem),
        lists=pl.BlockSpec(memory_space=pltpu.HBM),
        queries=of_queries(LANES),
        keys=of_keys(LANES, once=False),
        keys_once=of_keys(LANES, once=True),
        rows_q=of_queries(width),
        rows_k=of_keys(width, once=False),
        rows_k_once=of_keys(width, once=True),
        codes_k=pl.BlockSpec((None, tiles, 8, lanes), lambda b, g, i: (b, 0, 0, 0)),
    )


def list_scratch(call: Call) -> dict[str, Any]:
    """What `walk` needs."""
    return {"buffer": pltpu.SMEM((2 * call.record,), jnp.int32), "copied": pltpu.SemaphoreType.DMA((2,))}


def walk(
    call: Call, info: Any, lists: Any, buffer: Any, copied: Any, visit: Callable[..., None], *, brisk: bool = True
) -> None:
    """`visit(tile, entries, kind, words)` for every work item of the super-block; entries are scalars, kind is a Python
    int, and words(entry) are those of a query's heads.

    Args:
        call: sizes.
        info: words of the super-block, in scalar memory; see `lists.Work`.
        lists: all lists, one after the other, where the compiler put them.
        buffer, copied: of `list_scratch`.
        visit: does the work.
        brisk: many queries at a time. What is rare (a kernel with `online`, and the kinds of visit that are) goes in
            smaller parts: programs are shorter then, and take less time to compile.
    """
    b, n, i = (pl.program_id(axis) for axis in range(3))
    step = (b * call.K + n) * call.blocks + i
    live = info[0, 0] if call.fixed is None else call.fixed[0]
    low = (1 << TILE_BITS) - 1

    def copy(t: Any, half: Any) -> Any:
        first = (step * call.tiling.tiles + (info[0, 1 + t] & low)) * call.record
        source = lists.at[pl.ds(pl.multiple_of(first, call.record), call.record)]
        target = buffer.at[pl.ds(pl.multiple_of(half * call.record, call.record), call.record)]
        return pltpu.make_async_copy(source, target, copied.at[half])

    @pl.when(live > 0)
    def _first() -> None:
        copy(0, 0).start()

    def visit_tile(t: Any, _: None) -> None:
        half = t & 1
        copy(t, half).wait()

        @pl.when(t + 1 < live)
        def _next() -> None:
            copy(t + 1, 1 - half).start()

        word = info[0, 1 + t]
        tile, kind = word & low, (word >> TILE_BITS) & ((1 << KIND_BITS) - 1)
        items = word >> (TILE_BITS + KIND_BITS) if call.fixed is None else call.fixed[1]

        def words(entry: Any) -> list[Any]:
            if call.words.inside:
                return [entry >> PLACE_BITS]
            # What fills an item up is behind the last query: it finds what is there, and nobody reads its rows.
            at = half * call.record + behind(entry, call)
            return [buffer[at + n * call.queries] for n in range(call.words.count)]

        def visit_items(static: int) -> None:
            start = half * call.record + call.record - call.length

            def several(first: Any, part: int, count: Any) -> None:
                def one(number: Any, _: None) -> None:
                    visit(tile, [buffer[first + number * part + j] for j in range(part)], static, words)

                jax.lax.fori_loop(0, count, one, None)

            if brisk and call.common(static):
                long, single = call.runs(items)
                several(start, call.together, long)
                several(start + long * call.together, call.item, single)
            else:
                part = short_part(call.item, call.chunks)
                several(start, part, items * (call.item // part))

        if call.fixed is not None:
            visit_items(call.fixed[2])
            return
        for static in (WHOLE, SHARED, CUT):
            pl.when(kind == static)(lambda static=static: visit_items(static))

    jax.lax.fori_loop(0, live, visit_tile, None)


def places(entries: Sequence[Any], kind: int) -> list[Any]:
    """First row of each entry's query in an array that has two tiles of each query."""
    found = entries if kind == WHOLE else [x & ((1 << PLACE_BITS) - 1) for x in entries]
    return [pl.multiple_of(x, ROWS) for x in found]


def number_of(entry: Any, call: Call) -> Any:
    """The place in the super-block of an entry's query; of what fills an item up, the last one: its bits are shut."""
    return jnp.minimum(behind(entry, call), call.queries - 1)


def behind(entry: Any, call: Call) -> Any:
    """The place in the super-block of an entry's query; of what fills an item up, one behind the last."""
    return jax.lax.shift_right_logical(entry & ((1 << PLACE_BITS) - 1), call.rows.bit_length())


def tile_at(place: Any, rows: int, offset: int = 0) -> Any:
    """The rows from `offset` on behind a place."""
    return pl.ds(pl.multiple_of(place + offset, ROWS) if offset else place, rows)


def rows_at(ref: Any, entries: Sequence[Any], call: Call) -> Array:
    """The rows of each entry's query in an array [queries, rows, lanes], one below the other."""
    return jnp.concatenate([ref[number_of(entry, call)] for entry in entries], axis=0)


def gathered(ref: Any, at: Sequence[Any], rows: int, offset: int = 0) -> Array:
    """The rows of each query, one below the other."""
    return jnp.concatenate([ref[tile_at(place, rows, offset)] for place in at], axis=0)


def in_turn(count: int, begin: Callable[[int], Any], weigh: Callable[[Any], Any], end: Callable[[Any], None]) -> None:
    """Three stages of `count` chunks: a chunk is begun two before it is weighed, and ended one after."""
    begun = [begin(n) for n in range(min(2, count))]
    last = None
    for n in range(count):
        if n + 2 < count:
            begun.append(begin(n + 2))
        weighed = weigh(begun[n])
        if n:
            end(last)
        last = weighed
    end(last)


def each_line(call: Call, body: Callable[[Any, None], None]) -> None:
    """`body` for every line of the super-block, several at once so that one does not wait for the one before."""
    at_once = max(n for n in (1, 2, 4) if call.lines % n == 0) if not call.interpret else 1

    def several(first: Any, _: None) -> None:
        for n in range(at_once):
            body(first * at_once + n, None)

    jax.lax.fori_loop(0, call.lines // at_once, several, None)


def compiler_params() -> Any:
    """Super-blocks of a kv head are taken in their order."""
    semantics = ("parallel", "parallel", "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)
