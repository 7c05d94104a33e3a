"""The key/value cache as a pytree that mechanisms extend, sharded by rule, in any of three number types.

A row holds one document; slot s of it belongs to the document's s-th token. What a mechanism remembers of a key (RAVE's
gate keys) lies beside k and v in the same slots, in the mechanism's own number type.

Kv heads stand before slots: attention reads one head's slots as a matrix, and a TPU pads the last two axes of an array
to its tiles, which few heads would fill badly.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import Keys
from rave_jax.batch import TokenInfo
from rave_jax.kernels.routed import HostRegions, host
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Bool, Float, Int, Int8

CacheType = Literal["compute", "bfloat16", "int8"]
RegionMemory = Literal["device", "host"]
"""Where keys and values of regions lie."""


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


class StoredRegions(NamedTuple):
    """What is kept of a run's layers: keys [L,B,K,R*m,...], and of each region what the layer's router summarised
    [L,B,K,R,...], from which its descriptors come: they are never computed twice."""

    keys: StoredKeys
    summary: Any


class RegionSlots(NamedTuple):
    """Visual keys region by region, so that a query can read the few regions it chose.

    Slot n * m + i of a row belongs to the i-th token of region n + 1; a region that a grid cuts short leaves its last
    slots empty. `info` are the token codes of the slots [B,R*m], 0 where one is empty; `count` [B] are each row's
    tokens in regions.
    """

    layer_runs: tuple[StoredRegions, ...]
    info: TokenInfo
    count: Int[Array, "B"]


class KvCache(NamedTuple):
    """Keys of all layers, by layer runs of the decoder. `info` are the token codes of the slots [B,S]; `index`
    [B] is each row's next free slot. Slots from there on hold leftovers that no query sees. Where mechanisms ask for
    regions, the keys of visual tokens lie in `regions` instead.
    """

    layer_runs: tuple[StoredKeys, ...]
    info: TokenInfo
    index: Int[Array, "B"]
    regions: RegionSlots | None = None

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens of each row: the place of the next one in its document."""
        return self.index if self.regions is None else self.index + self.regions.count

    @property
    def size(self) -> int:
        """Slots per row."""
        return self.info.document.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on devices."""
        return _nbytes(self) - self.host_nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of the arrays in host memory."""
        return _nbytes([x for x in jax.tree.leaves(self, is_leaf=_of_host) if _of_host(x)])


def _nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _of_host(x: Any) -> bool:
    return isinstance(x, HostRegions)


def empty_cache(
    layer_runs: tuple[Keys, ...],
    kind: CacheType,
    regions: tuple[Keys, ...] | None = None,
    host_tokens: int | None = None,
) -> KvCache:
    """A cache with nothing in it, on the current mesh.

    Args:
        layer_runs: shapes of the keys as the model computes them, [L,B,S,K,...] each.
        kind: number type of k and v: as computed, bfloat16, or int8 with a float32 scale per token and kv head.
        regions: the same for the slots of regions [L,B,R*m,K,...], their summaries [L,B,R,K,...]; None without regions.
        host_tokens: m, slots of a region, where keys and values of regions lie in host memory; None where they do not.
    """

    def zeros(x: jax.ShapeDtypeStruct, dtype: jnp.dtype | None = None) -> Array:
        L, B, S, K, *rest = x.shape
        return jnp.zeros((L, B, K, S, *rest), dtype or x.dtype)

    def kept(x: Any, tokens: int | None) -> Array | Quantised | HostRegions:
        dtype = {"compute": x.dtype, "bfloat16": jnp.dtype(jnp.bfloat16), "int8": jnp.dtype(jnp.int8)}[kind]
        if tokens is None:
            values = zeros(x, dtype)
        else:
            L, B, S, K, h = x.shape
            values = host.empty((L, B, K, S // tokens, tokens, h), dtype)
        if kind == "int8":
            return Quantised(values, zeros(jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32)))
        return values

    def stored(keys: Keys, tokens: int | None = None) -> StoredKeys:
        return StoredKeys(kept(keys.k, tokens), kept(keys.v, tokens), jax.tree.map(zeros, keys.remembered))

    def codes(keys: Keys) -> TokenInfo:
        return TokenInfo(*[jnp.zeros(keys.k.shape[1:3], jnp.int32)] * len(TokenInfo._fields))

    none = jnp.zeros(layer_runs[0].k.shape[1:2], jnp.int32)
    far = None
    if regions is not None:
        kept_regions = (StoredRegions(stored(keys, host_tokens), jax.tree.map(zeros, keys.summary)) for keys in regions)
        far = RegionSlots(tuple(kept_regions), codes(regions[0]), none)
    return placed(KvCache(tuple(map(stored, layer_runs)), codes(layer_runs[0]), none, far))


def placed(cache: KvCache) -> KvCache:
    """The cache where the sharding rules want it: rows and kv heads are split, slots and layers are not."""

    def keys(x: Array) -> Array:
        return shard(x, "layers", "batch", "kv_heads", "length", *[None] * (x.ndim - 4))

    def codes(x: Array) -> Array:
        return shard(x, "batch", "length")

    far = cache.regions
    if far is not None:
        layer_runs = jax.tree.map(keys, far.layer_runs)
        far = RegionSlots(layer_runs, jax.tree.map(codes, far.info), shard(far.count, "batch"))
    layer_runs = jax.tree.map(keys, cache.layer_runs)
    return KvCache(layer_runs, jax.tree.map(codes, cache.info), shard(cache.index, "batch"), far)


def write(stored: StoredKeys, layer: Array, start: Int[Array, "B"], new: Keys) -> StoredKeys:
    """`stored` with the keys `new` [B,T,K,...] of one layer in each row's slots start .. start + T - 1.

    A row whose run does not fit into the slots is left as it was.
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

    mine = jax.tree.map(lambda x: _of_layer(x, layer), stored, is_leaf=_of_host)
    return Keys(unpack(mine.k), unpack(mine.v), mine.remembered)


def read_remembered(stored: StoredKeys, layer: Array) -> tuple[Any, ...]:
    """What mechanisms remember of the keys of one layer [B,S,K,...]."""
    return jax.tree.map(lambda x: _of_layer(x, layer), stored.remembered)


def _of_layer(x: Array | HostRegions, layer: Array) -> Array:
    if isinstance(x, HostRegions):
        return jnp.swapaxes(slots_of(x.of_layer(layer), 2), 1, 2)
    return jnp.swapaxes(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), 1, 2)


def slots_of(x: Array, axis: int) -> Array:
    """Regions [...,R,m,...] as their slots [...,R*m,...]; R is `axis`."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def write_info(held: TokenInfo, start: Int[Array, "B"], new: TokenInfo) -> TokenInfo:
    """`write` for the token codes [B,S]."""
    S, T = held.document.shape[1], new.document.shape[1]
    # Every slot picks its code: for arrays this small one pass is quicker than a scatter and the copies around it.
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


class RegionReach(NamedTuple):
    """The first regions of a row: how many, and how many slots they have."""

    regions: int
    slots: int


def take(cache: KvCache, rows: Int[Array, "n"] | None, reach: int, regions: RegionReach | None = None) -> KvCache:
    """A cache of its own with the first `reach` slots of `rows` (for numbers beyond them, of the last), or of all, and
    the first of their regions (None, and of all rows: all regions). Regions of `rows` lie on the device."""
    if rows is None:
        layer_runs = jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, reach, axis=3), cache.layer_runs)
        return KvCache(layer_runs, jax.tree.map(lambda x: x[:, :reach], cache.info), cache.index, cache.regions)
    layer_runs = jax.tree.map(lambda x: x.at[:, rows, :, :reach].get(mode="clip"), cache.layer_runs)
    info = jax.tree.map(lambda x: x.at[rows, :reach].get(mode="clip"), cache.info)
    far = cache.regions
    if far is not None:
        far = _take_regions(far, rows, regions)
    return KvCache(layer_runs, info, cache.index.at[rows].get(mode="clip"), far)


def _take_regions(far: RegionSlots, rows: Int[Array, "n"], reach: RegionReach | None) -> RegionSlots:
    most, slots = (None, None) if reach is None else reach

    def first(stop: int | None, tree: Any) -> Any:
        def of_rows(x: Array | HostRegions) -> Array:
            if isinstance(x, HostRegions):
                return slots_of(x.of_rows(rows, x.shape[3] if most is None else most), 3)
            return x.at[:, rows, :, :stop].get(mode="clip")

        return jax.tree.map(of_rows, tree, is_leaf=_of_host)

    layer_runs = tuple(StoredRegions(first(slots, one.keys), first(most, one.summary)) for one in far.layer_runs)
    codes = jax.tree.map(lambda x: x.at[rows, :slots].get(mode="clip"), far.info)
    return RegionSlots(layer_runs, codes, far.count.at[rows].get(mode="clip"))


def emptied(cache: KvCache, rows: Bool[Array, "B"]) -> KvCache:
    """The cache with nothing in some of its rows: what is left in their slots counts as not written."""
    far = cache.regions
    if far is not None:
        far = far._replace(count=jnp.where(rows, 0, far.count))
    return cache._replace(index=jnp.where(rows, 0, cache.index), regions=far)


def put(cache: KvCache, part: KvCache, rows: Int[Array, "n"] | None) -> KvCache:
    """`cache` with the slots that `take` gave written back. Rows numbered beyond it stand last, and are dropped."""
    if rows is None:
        # All regions were taken: those of the part are the cache's.
        near = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice(x, y, (0,) * x.ndim),
            cache._replace(regions=None),
            part._replace(regions=None),
        )
        return placed(near._replace(regions=part.regions))

    def one_row(n: Array, cache: KvCache) -> KvCache:
        def back(x: Array, y: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(x, jax.lax.dynamic_slice_in_dim(y, n, 1, axis), rows[n], axis)

        def of_layers(x: Array | HostRegions, y: Array) -> Array | HostRegions:
            if isinstance(x, HostRegions):
                mine = jax.lax.dynamic_index_in_dim(y, n, 1, keepdims=False)
                return x.with_row(rows[n], mine.reshape(*mine.shape[:2], -1, *x.shape[4:]))
            return back(x, y, 1)

        def of_rows(x: Array, y: Array) -> Array:
            return back(x, y, 0)

        layer_runs = jax.tree.map(of_layers, cache.layer_runs, part.layer_runs)
        info, index = jax.tree.map(of_rows, (cache.info, cache.index), (part.info, part.index))
        far, new = cache.regions, part.regions
        if far is not None and new is not None:
            stored = jax.tree.map(of_layers, far.layer_runs, new.layer_runs, is_leaf=_of_host)
            # Nothing of the row lies beyond the regions taken, but codes of who had it before may.
            size = far.info.document.shape[1]
            codes = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, size - x.shape[1]))), new.info)
            far = RegionSlots(stored, *jax.tree.map(of_rows, (far.info, far.count), (codes, new.count)))
        return KvCache(layer_runs, info, index, far)

    # Row by row, and in place: for a scatter of rows this large the compiler copies the whole cache.
    real = jnp.sum(rows < cache.index.shape[0])
    return placed(jax.lax.fori_loop(0, real, one_row, cache))
