"""Which heads of a query opened which regions of a tile, where each query head has a choice of its own.

A query is listed for a tile if any of its heads opened any of the tile's regions; each of its heads then has one bit
for each region of the tile. Where a tile has one region and few heads, these are in the query's entry; otherwise in
words that lie in scalar memory before the tile's list. A row of the gathered query takes its own bits out of a word by
a shift that is static.

Lists for each head are no way around the union: a gathered query is a load of 8 rows, and a head by itself is one of
them. In these kernels that is as many items for each head as for the group; with loads and stores of single rows it is
four stores a row, more than all that the dense kernel does for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.kernels.attention.pallas_tpu.tile import LANES, wide
from rave_jax.typing import Array, Int, NpArray

BITS = 32
ENTRY_BITS = 15
"""Bits of an entry beside the query's place."""


@dataclass(frozen=True)
class HeadWords:
    """Where the bits of a query's heads lie. `heads` is how many choices a query has: with one there are no words."""

    heads: int
    rows: int
    """Of a gathered query, a power of two: its heads, filled up."""
    slots: int
    """Bits of a row: a power of two, at least the regions of a tile."""

    @classmethod
    def of(cls, heads: int, rows: int, sharing: int) -> HeadWords:
        """For tiles of so many regions, or of one."""
        return cls(heads, rows, 1 << (max(sharing, 1) - 1).bit_length())

    @property
    def inside(self) -> bool:
        """Are the bits in the entries?"""
        return self.heads > 1 and self.slots == 1 and self.rows <= ENTRY_BITS

    @property
    def count(self) -> int:
        """Words of a query and tile beside the entries."""
        return 0 if self.heads == 1 or self.inside else max(1, self.rows * self.slots // BITS)

    @property
    def rows_each(self) -> int:
        """Rows that share a word."""
        return min(self.rows, BITS // self.slots)

    def pack(self, open_: Int[Array, "B K T R"], of_tile: Int[NpArray, "tiles n"]) -> Int[Array, "B K T tiles words"]:
        """Bits by region (see `lists.open_heads`) as words by tile, whose regions are `of_tile`. Rows without a head
        are open where any head is: what they find is not read, but it must be a number."""
        words = [jnp.zeros((*open_.shape[:3], len(of_tile)), jnp.int32)] * max(self.count, 1)
        for slot in range(of_tile.shape[1]):
            own = jnp.where(of_tile[:, slot] >= 0, open_[..., np.maximum(of_tile[:, slot], 0)], 0)
            for row in range(self.rows):
                bit = (own >> row) & 1 if row < self.heads else (own != 0).astype(jnp.int32)
                words[row // self.rows_each] |= bit << (row % self.rows_each * self.slots + slot)
        return jnp.stack(words, axis=-1)

    def rows_of(self, words: Sequence[Any], width: int) -> Int[Array, "rows width"]:
        """The bits of each row of a query, its rows below one another, in every lane."""
        row = jax.lax.broadcasted_iota(jnp.int32, (self.rows, LANES), 0)
        return wide(self._own([jnp.full((self.rows, LANES), word, jnp.int32) for word in words], row), width)

    def lanes_of(
        self, words: Sequence[Sequence[Any]], line_of: Callable[[Sequence[Any]], Array]
    ) -> Int[Array, "1 queries*rows"]:
        """The bits of each row of several queries, all rows side by side. `line_of` puts a line of each query in the
        lanes of its rows."""
        zero = jnp.zeros((1, LANES), jnp.int32)
        lines = [line_of([zero + of_query[n] for of_query in words]) for n in range(len(words[0]))]
        row = jax.lax.broadcasted_iota(jnp.int32, (1, lines[0].shape[1]), 1) & (self.rows - 1)
        return self._own(lines, row)

    def _own(self, words: Sequence[Array], row: Array) -> Array:
        """Of words, each everywhere, that of each row, its bits lowest."""
        mine = words[0]
        for n, word in enumerate(words[1:], 1):
            mine = jnp.where(row >= n * self.rows_each, word, mine)
        return jax.lax.shift_right_logical(mine, (row & (self.rows_each - 1)) * self.slots)
