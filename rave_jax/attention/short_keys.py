"""Entries of layers behind a drop: keys of the tokens that stayed, and which entry of the row each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.kv_cache import KvCache, StoredKeys, place_codes
from rave_jax.attention.tokens import Standing
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Bool, Int


class ShortKeys(NamedTuple):
    """What a cache keeps of such a layer run. The entries from `index` on hold leftovers.

    Fields:
        keys: of the run's layers; entry s belongs to the s-th token that stayed.
        source: index of each among all entries of the row, [1,B,S].
        index: each row's next free entry, [1,B].
    """

    keys: StoredKeys
    source: Int[Array, "1 B S"]
    index: Int[Array, "1 B"]

    @property
    def size(self) -> int:
        """Entries of a row."""
        return self.source.shape[2]

    def admit(self, tokens: Int[Array, "B W"], own: Int[Array, "B T"], total: int) -> tuple[ShortKeys, Standing]:
        """Give the tokens of a chunk that stand their entries.

        Args:
            tokens: their indices in the chunk; T where nothing is.
            own: which entry of the row each of the chunk's T tokens has.
            total: entries of a row.

        Returns:
            the keys, whose `index` the tokens are counted in, and what stands for the layers.
        """
        start, W, T = self.index[0], tokens.shape[1], own.shape[1]
        real = tokens < T
        entered = jnp.where(real, jnp.take_along_axis(own, tokens, axis=1, mode="clip"), total)
        place = jnp.arange(self.size, dtype=jnp.int32) - start[:, None]
        written = (place >= 0) & (place < W) & (start[:, None] + W <= self.size)
        source = jnp.where(written, jnp.take_along_axis(entered, place, axis=1, mode="clip"), self.source[0])
        index = start + jnp.sum(real, axis=1, dtype=jnp.int32)
        held = jnp.arange(self.size, dtype=jnp.int32) < index[:, None]
        short = self._replace(source=source[None], index=index[None])
        return short, Standing(tokens, jnp.where(held, source, total))

    def taken(self, rows: Int[Array, "n"] | None, reach: int) -> ShortKeys:
        """The first `reach` entries of some rows (for numbers beyond them, of the last), or of all."""
        keys = self.keys.taken(rows, reach)
        if rows is None:
            return ShortKeys(keys, self.source[:, :, :reach], self.index)
        source, index = (x.at[:, rows].get(mode="clip") for x in (self.source, self.index))
        return ShortKeys(keys, source[:, :, :reach], index)

    def emptied(self, rows: Bool[Array, "B"]) -> ShortKeys:
        """Nothing in some of the rows."""
        return self._replace(index=jnp.where(rows, 0, self.index))

    def placed(self) -> ShortKeys:
        """The keys where the sharding rules want them."""
        return ShortKeys(self.keys.placed(), place_codes(self.source[0])[None], shard(self.index, None, "batch"))


def with_short_keys(cache: KvCache, behind: Sequence[bool]) -> KvCache:
    """An empty cache in which some layer runs, those behind a drop, keep only what stays."""

    def short(keys: StoredKeys) -> ShortKeys:
        _, B, _, S = jax.tree.leaves(keys)[0].shape[:4]
        return ShortKeys(keys, jnp.zeros((1, B, S), jnp.int32), jnp.zeros((1, B), jnp.int32))

    layer_runs = tuple(
        short(kept) if after and isinstance(kept, StoredKeys) else kept
        for kept, after in zip(cache.layer_runs, behind, strict=True)
    )
    return cache._replace(layer_runs=layer_runs).placed()
