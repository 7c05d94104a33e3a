"""The key/value cache as a pytree that mechanisms extend, sharded by rule, in any of three number types.

A row holds one document; entry s of it belongs to the document's s-th token. What a mechanism remembers of a key
(RAVE's gate keys) lies beside k and v in the same entries, in the mechanism's own number type. Layers without keys keep
a state (`states.py`).

Kv heads stand before entries: attention reads one head's entries as a matrix, and a TPU pads the last two axes of an
array to its tiles, which few heads would fill badly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.attend import AttentionOutput, attend
from rave_jax.attention.base import Features, Keys, Mechanism
from rave_jax.attention.cache import Admitted, Cache, CacheType, RegionReach
from rave_jax.attention.states import StoredStates
from rave_jax.attention.tokens import Deciding
from rave_jax.batch import TokenInfo
from rave_jax.kernels.attention import Implementation, MaskCodes
from rave_jax.kernels.routed import HostRegions, host
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Bool, Float, Int, Int8


class Quantised(NamedTuple):
    """Numbers as values * scale, with one scale for the h numbers of a token and kv head (symmetric, to nearest)."""

    values: Int8[Array, "*axes h"] | HostRegions
    scale: Float[Array, "*axes"]


class StoredKeys(NamedTuple):
    """`Keys` of all layers of a run as they lie in the cache: every array is [L,B,K,S,...]. Keys and values of
    regions may lie in host memory."""

    k: Float[Array, "L B K S h"] | Quantised | HostRegions
    v: Float[Array, "L B K S h"] | Quantised | HostRegions
    remembered: tuple[Any, ...]

    def attend(
        self,
        x: Features,
        keys: Keys,
        layer: Int[Array, ""],
        entries: Int[Array, "B"],
        codes: MaskCodes,
        info_q: TokenInfo,
        info_k: TokenInfo,
        mechanisms: Sequence[Mechanism],
        *,
        regions: int,
        implementation: Implementation,
        queries: Int[Array, "B N"] | None = None,
        progress: Float[Array, ""] | None = None,
        deciding: Deciding | None = None,
    ) -> tuple[AttentionOutput, StoredKeys]:
        """As `LayerKeys` says; `entries` is the first of each row. Entries beyond `info_k` are written and not read."""
        stored = write(self, layer, entries, keys)
        held = read(stored, layer, x.q.dtype)
        seen_entries = info_k.document.shape[1]
        if held.k.shape[1] > seen_entries:
            held = jax.tree.map(lambda x: x[:, :seen_entries], held)
        seen = attend(
            x,
            held,
            codes,
            info_q,
            info_k,
            mechanisms,
            implementation=implementation,
            queries=queries,
            regions=regions,
            progress=progress,
            deciding=deciding,
        )
        return seen, stored

    def emptied(self, rows: Bool[Array, "B"]) -> StoredKeys:
        """The keys as they are: which of them count is said beside them."""
        return self

    def taken(self, rows: Int[Array, "n"] | None, reach: int) -> StoredKeys:
        """The first `reach` entries of some rows (for numbers beyond them, of the last), or of all."""
        if rows is None:
            return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, reach, axis=3), self)
        return jax.tree.map(lambda x: x.at[:, rows, :, :reach].get(mode="clip"), self)

    def placed(self) -> StoredKeys:
        """The keys where the sharding rules want them."""
        return jax.tree.map(place_keys, self)


class KvCache(NamedTuple):
    """A cache without regions (`Cache`). Entries from `index` on hold leftovers that no query sees.

    Fields:
        layer_runs: keys or states of all layers, by layer runs of the decoder; behind a drop `ShortKeys`.
        info: token codes of the entries [B,S].
        index: each row's next free entry.
    """

    layer_runs: tuple[Any, ...]
    info: TokenInfo
    index: Int[Array, "B"]

    @property
    def length(self) -> Int[Array, "B"]:
        """As `Cache` says."""
        return self.index

    @property
    def codes(self) -> TokenInfo:
        """As `Cache` says."""
        return self.info

    @property
    def size(self) -> int:
        """As `Cache` says."""
        return self.info.document.shape[1]

    @property
    def num_regions(self) -> int:
        """As `Cache` says."""
        return 0

    @property
    def nbytes(self) -> int:
        """As `Cache` says."""
        return nbytes(self)

    @property
    def host_nbytes(self) -> int:
        """As `Cache` says."""
        return 0

    def admit(
        self, info: TokenInfo, region_offset: Int[Array, "B T"] | None, empty_summaries: Callable[[int], Sequence[Any]]
    ) -> Admitted:
        """As `Cache` says. A row for which `index` + T is beyond its size is not written."""
        start, T = self.index, info.document.shape[1]
        own = start[:, None] + jnp.arange(T, dtype=jnp.int32)
        # Padding is written too, and overwritten by what follows.
        held = write_info(self.info, start, info)
        # What lies beyond is left from before, and `mask` hooks may not take it for tokens.
        reached = jnp.arange(self.size, dtype=jnp.int32) < start[:, None] + T
        held = jax.tree.map(lambda code: jnp.where(reached, code, 0), held)
        index = start + jnp.sum(info.document > 0, axis=1, dtype=jnp.int32)
        return Admitted(self._replace(info=held, index=index), start, held, own)

    def with_layers(self, layer_runs: tuple[Any, ...]) -> KvCache:
        """As `Cache` says."""
        return self._replace(layer_runs=layer_runs).placed()

    def take(
        self,
        rows: Int[Array, "n"] | None,
        reach: int,
        regions: RegionReach | None = None,
        reaches: Sequence[int] | None = None,
    ) -> KvCache:
        """As `Cache` says."""
        reaches = [reach] * len(self.layer_runs) if reaches is None else reaches
        layer_runs = tuple(kept.taken(rows, most) for kept, most in zip(self.layer_runs, reaches, strict=True))
        if rows is None:
            return KvCache(layer_runs, jax.tree.map(lambda x: x[:, :reach], self.info), self.index)
        info = jax.tree.map(lambda x: x.at[rows, :reach].get(mode="clip"), self.info)
        return KvCache(layer_runs, info, self.index.at[rows].get(mode="clip"))

    def put(self, part: KvCache, rows: Int[Array, "n"] | None) -> KvCache:
        """As `Cache` says."""
        return put_rows(self, part, rows) if rows is not None else self.with_first_entries(part).placed()

    def with_first_entries(self, part: KvCache) -> KvCache:
        """The first entries of all rows from `part`."""
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, (0,) * x.ndim), self, part)

    def with_row(self, n: Int[Array, ""], part: KvCache, rows: Int[Array, "n"]) -> KvCache:
        """As `Cache` says."""
        layer_runs = jax.tree.map(lambda x, y: row_back(x, y, n, rows, 1), self.layer_runs, part.layer_runs)
        rest = (self.info, self.index), (part.info, part.index)
        return KvCache(layer_runs, *jax.tree.map(lambda x, y: row_back(x, y, n, rows, 0), *rest))

    def emptied(self, rows: Bool[Array, "B"]) -> KvCache:
        """As `Cache` says."""
        layer_runs = tuple(kept.emptied(rows) for kept in self.layer_runs)
        return self._replace(layer_runs=layer_runs, index=jnp.where(rows, 0, self.index))

    def placed(self) -> KvCache:
        """As `Cache` says."""
        layer_runs = tuple(kept.placed() for kept in self.layer_runs)
        return KvCache(layer_runs, jax.tree.map(place_codes, self.info), shard(self.index, "batch"))


def place_keys(x: Array) -> Array:
    """Keys of a cache [L,B,K,S,...] where the sharding rules want them."""
    return shard(x, "layers", "batch", "kv_heads", "entries", *[None] * (x.ndim - 4))


def place_codes(x: Array) -> Array:
    """Token codes of entries [B,S] where the sharding rules want them."""
    return shard(x, "batch", "entries")


def put_rows[C: Cache](cache: C, part: C, rows: Int[Array, "n"]) -> C:
    """`cache` with the rows of `part` in its `rows`, row by row, and in place: for a scatter of rows this large the
    compiler copies the whole cache."""
    real = jnp.sum(rows < cache.index.shape[0])
    return jax.lax.fori_loop(0, real, lambda n, cache: cache.with_row(n, part, rows), cache).placed()


def row_back(x: Array, y: Array, n: Int[Array, ""], rows: Int[Array, "n"], axis: int) -> Array:
    """x with row n of y in its row rows[n]; rows are counted along `axis`."""
    return jax.lax.dynamic_update_slice_in_dim(x, jax.lax.dynamic_slice_in_dim(y, n, 1, axis), rows[n], axis)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, wherever they lie."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def of_host(x: Any) -> bool:
    """Is it kept in host memory?"""
    return isinstance(x, HostRegions)


def empty_cache(layer_runs: tuple[Keys | StoredStates, ...], kind: CacheType) -> KvCache:
    """A cache with nothing in it, on the current mesh.

    Args:
        layer_runs: shapes of the keys as the model computes them, [L,B,S,K,...] each, and of states, [L,B,...]. There
            are keys in at least one.
        kind: number type of k and v: as computed, bfloat16, or int8 with a float32 scale per token and kv head.
    """
    stored = tuple(kept.empty() if isinstance(kept, StoredStates) else empty_keys(kept, kind) for kept in layer_runs)
    codes = next(empty_codes(kept) for kept in layer_runs if isinstance(kept, Keys))
    return KvCache(stored, codes, jnp.zeros_like(codes.document[:, 0])).placed()


def zero_entries(x: jax.ShapeDtypeStruct, dtype: jnp.dtype | None = None) -> Array:
    """Zeros for what the model computes as [L,B,S,K,...], as it is kept."""
    L, B, S, K, *rest = x.shape
    return jnp.zeros((L, B, K, S, *rest), dtype or x.dtype)


def empty_keys(keys: Keys, kind: CacheType, host_tokens: int | None = None) -> StoredKeys:
    """Entries of a run's layers with nothing in them.

    Args:
        keys, kind: as in `empty_cache`.
        host_tokens: m, entries of a region, where keys and values of regions lie in host memory; else None.
    """

    def kept(x: Any) -> Array | Quantised | HostRegions:
        dtype = {"compute": x.dtype, "bfloat16": jnp.dtype(jnp.bfloat16), "int8": jnp.dtype(jnp.int8)}[kind]
        if host_tokens is None:
            values = zero_entries(x, dtype)
        else:
            L, B, S, K, h = x.shape
            values = host.empty((L, B, K, S // host_tokens, host_tokens, h), dtype)
        if kind == "int8":
            return Quantised(values, zero_entries(jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32)))
        return values

    return StoredKeys(kept(keys.k), kept(keys.v), jax.tree.map(zero_entries, keys.remembered))


def empty_codes(keys: Keys) -> TokenInfo:
    """Token codes of empty entries."""
    return TokenInfo(*[jnp.zeros(keys.k.shape[1:3], jnp.int32)] * len(TokenInfo._fields))


def write(stored: StoredKeys, layer: Array, start: Int[Array, "B"], new: Keys) -> StoredKeys:
    """`stored` with the keys `new` [B,T,K,...] of one layer in each row's entries start .. start + T - 1.

    A row whose run does not fit into the entries is left as it was.
    """

    def pack(x: Array, like: Any) -> Any:
        return quantise(x) if isinstance(like, Quantised) else x

    def run(old: Array, x: Array) -> Array:
        return _write_runs(old, layer, start, jnp.swapaxes(x, 1, 2))

    packed = StoredKeys(pack(new.k, stored.k), pack(new.v, stored.v), new.remembered)
    return jax.tree.map(run, stored, packed)


def read(stored: StoredKeys, layer: Array, dtype: jnp.dtype) -> Keys:
    """The keys of one layer [B,S,K,...], k and v in `dtype`. What lies in host memory is copied from there whole."""

    def unpack(x: Any) -> Array:
        return (
            x.values.astype(dtype) * x.scale[..., None].astype(dtype) if isinstance(x, Quantised) else x.astype(dtype)
        )

    mine = jax.tree.map(lambda x: _of_layer(x, layer), stored, is_leaf=of_host)
    return Keys(unpack(mine.k), unpack(mine.v), mine.remembered)


def read_remembered(stored: StoredKeys, layer: Array) -> tuple[Any, ...]:
    """What mechanisms remember of the keys of one layer [B,S,K,...]."""
    return jax.tree.map(lambda x: _of_layer(x, layer), stored.remembered)


def _of_layer(x: Array | HostRegions, layer: Array) -> Array:
    if isinstance(x, HostRegions):
        return jnp.swapaxes(entries_of(x.of_layer(layer), 2), 1, 2)
    return jnp.swapaxes(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), 1, 2)


def entries_of(x: Array, axis: int) -> Array:
    """Regions [...,R,m,...] as their entries [...,R*m,...]; R is `axis`."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def write_info(held: TokenInfo, start: Int[Array, "B"], new: TokenInfo) -> TokenInfo:
    """`write` for the token codes [B,S]."""
    S, T = held.document.shape[1], new.document.shape[1]
    # Every entry picks its code: for arrays this small one pass is quicker than a scatter and the copies around it.
    place = jnp.arange(S, dtype=jnp.int32) - start[:, None]
    written = (place >= 0) & (place < T) & (start[:, None] + T <= S)

    def run(old: Array, codes: Array) -> Array:
        return jnp.where(written, jnp.take_along_axis(codes, place, axis=1, mode="clip"), old)

    return jax.tree.map(run, held, new)


def quantise(x: Float[Array, "*axes h"]) -> Quantised:
    """int8 with one scale per row of h numbers: the largest of them becomes 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    return Quantised(jnp.round(wide / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale)


def _write_runs(stored: Array, layer: Array, start: Int[Array, "B"], runs: Array) -> Array:
    """`runs` [B,K,T,...] into `stored` [L,B,K,S,...] by one scatter of B windows: a run moves whole, and in place."""
    rows = jnp.arange(runs.shape[0], dtype=jnp.int32)
    at = jnp.stack([jnp.broadcast_to(layer, rows.shape), rows, start], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, runs.ndim)),
        inserted_window_dims=(0, 1),
        scatter_dims_to_operand_dims=(0, 1, 3),
    )
    return jax.lax.scatter(
        stored,
        at,
        runs.astype(stored.dtype),
        numbers,
        unique_indices=True,
        indices_are_sorted=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )
