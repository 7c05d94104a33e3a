"""The cache where mechanisms ask for regions.

Visual keys lie region by region, so that a query can read the few regions it chose (`region_cache.py`), and all others
as in a cache without regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import Keys
from rave_jax.attention.cache import Admitted, CacheType, RegionMemory, RegionReach
from rave_jax.attention.kv_cache import (
    KvCache,
    StoredKeys,
    empty_codes,
    empty_keys,
    entries_of,
    nbytes,
    of_host,
    place_codes,
    place_keys,
    put_rows,
    row_back,
    zero_entries,
)
from rave_jax.attention.region_cache import ChunkEntries, LayerRegions, StoredRegions, joined
from rave_jax.attention.states import StoredStates
from rave_jax.batch import TokenInfo
from rave_jax.kernels.routed import HostRegions
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Bool, Int


class RegionEntries(NamedTuple):
    """Visual keys region by region.

    Entry n * m + i of a row belongs to the i-th token of region n + 1; a region that a grid cuts short leaves its last
    entries empty. A layer run without keys has None. `info` are the token codes of the entries [B,R*m], 0 where one is
    empty; `count` [B] are each row's tokens in regions.
    """

    layer_runs: tuple[StoredRegions | None, ...]
    info: TokenInfo
    count: Int[Array, "B"]

    @property
    def size(self) -> int:
        """R * m: entries per row."""
        return self.info.document.shape[1]

    def take(self, rows: Int[Array, "n"], reach: RegionReach | None) -> RegionEntries:
        """The first regions of some rows, on the device."""
        most, entries = (None, None) if reach is None else reach

        def first(stop: int | None, tree: Any) -> Any:
            def of_rows(x: Array | HostRegions) -> Array:
                if isinstance(x, HostRegions):
                    return entries_of(x.of_rows(rows, x.shape[3] if most is None else most), 3)
                return x.at[:, rows, :, :stop].get(mode="clip")

            return jax.tree.map(of_rows, tree, is_leaf=of_host)

        layer_runs = tuple(
            None if one is None else StoredRegions(first(entries, one.keys), first(most, one.summary))
            for one in self.layer_runs
        )
        codes = jax.tree.map(lambda x: x.at[rows, :entries].get(mode="clip"), self.info)
        return RegionEntries(layer_runs, codes, self.count.at[rows].get(mode="clip"))

    def with_row(self, n: Int[Array, ""], part: RegionEntries, rows: Int[Array, "n"]) -> RegionEntries:
        """As `Cache` says."""

        def of_layers(x: Array | HostRegions, y: Array) -> Array | HostRegions:
            if isinstance(x, HostRegions):
                mine = jax.lax.dynamic_index_in_dim(y, n, 1, keepdims=False)
                return x.with_row(rows[n], mine.reshape(*mine.shape[:2], -1, *x.shape[4:]))
            return row_back(x, y, n, rows, 1)

        stored = jax.tree.map(of_layers, self.layer_runs, part.layer_runs, is_leaf=of_host)
        # Beyond the regions taken the row has no tokens, but codes of an earlier request may be left there.
        codes = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, self.size - x.shape[1]))), part.info)
        rest = (self.info, self.count), (codes, part.count)
        return RegionEntries(stored, *jax.tree.map(lambda x, y: row_back(x, y, n, rows, 0), *rest))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RegionCache:
    """A cache by regions (`Cache`)."""

    beside: KvCache
    """Keys in no region."""
    regions: RegionEntries
    """Keys of visual tokens."""
    tokens: int = field(metadata={"static": True})
    """m: entries of a region."""

    @property
    def info(self) -> TokenInfo:
        """Token codes of the entries that are in no region [B,S]."""
        return self.beside.info

    @property
    def codes(self) -> TokenInfo:
        """As `Cache` says."""
        return joined(self.info, self.regions.info)

    @property
    def index(self) -> Int[Array, "B"]:
        """As `Cache` says."""
        return self.beside.index

    @property
    def length(self) -> Int[Array, "B"]:
        """As `Cache` says."""
        return self.index + self.regions.count

    @property
    def size(self) -> int:
        """As `Cache` says."""
        return self.beside.size

    @property
    def num_regions(self) -> int:
        """As `Cache` says."""
        return self.regions.size // self.tokens

    @property
    def layer_runs(self) -> tuple[LayerRegions | StoredKeys | StoredStates, ...]:
        """As `Cache` says."""
        both = zip(self.beside.layer_runs, self.regions.layer_runs, strict=True)
        return tuple(
            near if isinstance(near, StoredStates) or far is None else LayerRegions(near, far) for near, far in both
        )

    @property
    def nbytes(self) -> int:
        """As `Cache` says."""
        return nbytes(self) - self.host_nbytes

    @property
    def host_nbytes(self) -> int:
        """As `Cache` says."""
        return nbytes([x for x in jax.tree.leaves(self, is_leaf=of_host) if of_host(x)])

    def admit(
        self, info: TokenInfo, region_offset: Int[Array, "B T"] | None, empty_summaries: Callable[[int], Sequence[Any]]
    ) -> Admitted:
        """As `Cache` says. A row that held no token starts from empty regions, whatever was left there."""
        entries = self._entries(info, region_offset)
        cache = self._entered(info, entries, empty_summaries(self.num_regions))
        own = entries.near if entries.far is None else jnp.where(info.region > 0, self.size + entries.far, entries.near)
        return Admitted(cache, entries, cache.codes, own)

    def _entries(self, info: TokenInfo, region_offset: Int[Array, "B T"] | None) -> ChunkEntries:
        """Entries of the tokens of a chunk."""
        visual = (info.document > 0) & (info.region > 0)
        others = (info.document > 0) & ~visual
        rank = jnp.cumsum(others, axis=1, dtype=jnp.int32) - 1
        near = jnp.where(others, self.index[:, None] + rank, self.size)
        if region_offset is None:
            return ChunkEntries(near, None)
        return ChunkEntries(near, jnp.where(visual, (info.region - 1) * self.tokens + region_offset, self.regions.size))

    def _entered(self, info: TokenInfo, entries: ChunkEntries, nothing: Sequence[Any]) -> RegionCache:
        """The cache with the codes and numbers of a chunk's tokens, whose keys the layers then write."""
        far, fresh = self.regions, self.length == 0

        def written(held: TokenInfo, at: Array, kept: Bool[Array, "B S"]) -> TokenInfo:
            rows = jnp.arange(at.shape[0])[:, None]
            cleared = jax.tree.map(lambda code: jnp.where(kept, code, 0), held)
            return jax.tree.map(lambda old, new: old.at[rows, at].set(new, mode="drop"), cleared, info)

        def emptied(old: Array, none: Array) -> Array:
            rows = fresh.reshape(-1, *[1] * (old.ndim - 2))
            return jnp.where(rows, jnp.swapaxes(none, 2, 3).astype(old.dtype), old)

        held = written(self.info, entries.near, jnp.arange(self.size) < self.index[:, None])
        index = self.index + jnp.sum(entries.near < self.size, axis=1, dtype=jnp.int32)
        if entries.far is not None:
            codes = written(far.info, entries.far, jnp.broadcast_to(~fresh[:, None], (len(fresh), far.size)))
            count = far.count + jnp.sum(entries.far < far.size, axis=1, dtype=jnp.int32)
            layer_runs = tuple(
                None if one is None else one._replace(summary=jax.tree.map(emptied, one.summary, none))
                for one, none in zip(far.layer_runs, nothing, strict=True)
            )
            far = RegionEntries(layer_runs, codes, count)
        return replace(self, beside=self.beside._replace(info=held, index=index), regions=far)

    def with_layers(self, layer_runs: tuple[LayerRegions | StoredKeys | StoredStates, ...]) -> RegionCache:
        """As `Cache` says."""
        near = tuple(kept.near if isinstance(kept, LayerRegions) else kept for kept in layer_runs)
        far = tuple(kept.far if isinstance(kept, LayerRegions) else None for kept in layer_runs)
        beside, regions = self.beside._replace(layer_runs=near), self.regions._replace(layer_runs=far)
        return replace(self, beside=beside, regions=regions).placed()

    def take(
        self,
        rows: Int[Array, "n"] | None,
        reach: int,
        regions: RegionReach | None = None,
        reaches: Sequence[int] | None = None,
    ) -> RegionCache:
        """As `Cache` says."""
        far = self.regions if rows is None else self.regions.take(rows, regions)
        return replace(self, beside=self.beside.take(rows, reach), regions=far)

    def put(self, part: RegionCache, rows: Int[Array, "n"] | None) -> RegionCache:
        """As `Cache` says."""
        if rows is not None:
            return put_rows(self, part, rows)
        # All regions were taken: those of the part are the cache's.
        return replace(part, beside=self.beside.with_first_entries(part.beside)).placed()

    def with_row(self, n: Int[Array, ""], part: RegionCache, rows: Int[Array, "n"]) -> RegionCache:
        """As `Cache` says."""
        beside = self.beside.with_row(n, part.beside, rows)
        return replace(self, beside=beside, regions=self.regions.with_row(n, part.regions, rows))

    def emptied(self, rows: Bool[Array, "B"]) -> RegionCache:
        """As `Cache` says."""
        far = self.regions._replace(count=jnp.where(rows, 0, self.regions.count))
        return replace(self, beside=self.beside.emptied(rows), regions=far)

    def placed(self) -> RegionCache:
        """As `Cache` says."""
        far = self.regions
        layer_runs = jax.tree.map(place_keys, far.layer_runs)
        far = RegionEntries(layer_runs, jax.tree.map(place_codes, far.info), shard(far.count, "batch"))
        return replace(self, beside=self.beside.placed(), regions=far)


def empty_region_cache(
    beside: KvCache, regions: tuple[Keys | None, ...], kind: CacheType, tokens: int, memory: RegionMemory
) -> RegionCache:
    """A cache by regions with nothing in it, on the current mesh.

    Args:
        beside: an empty cache for what is in no region.
        regions: shapes of the keys of regions as the model computes them, [L,B,R*m,K,...] each, their summaries
            [L,B,R,K,...]; None of runs without keys.
        kind: number type of k and v, as in `empty_cache`.
        tokens: m, entries of a region.
        memory: where keys and values of regions lie.
    """
    host_tokens = tokens if memory == "host" else None

    def empty(keys: Keys) -> StoredRegions:
        return StoredRegions(empty_keys(keys, kind, host_tokens), jax.tree.map(zero_entries, keys.summary))

    codes = next(empty_codes(keys) for keys in regions if keys is not None)
    kept = tuple(None if keys is None else empty(keys) for keys in regions)
    far = RegionEntries(kept, codes, jnp.zeros_like(beside.index))
    return RegionCache(beside, far, tokens).placed()
