"""The key/value cache as a pytree that mechanisms extend, sharded by rule, in any of three number types.

A row holds one document; slot s of it belongs to the document's s-th token. What a mechanism remembers of a key (RAVE's
gate keys) lies beside k and v in the same slots, in the mechanism's own number type.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import Keys
from rave_jax.batch import TokenInfo
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float, Int, Int8

CacheType = Literal["compute", "bfloat16", "int8"]


class Quantised(NamedTuple):
    """Numbers as values * scale, with one scale for the h numbers of a token and kv head (symmetric, to nearest)."""

    values: Int8[Array, "*axes h"]
    scale: Float[Array, "*axes 1"]


class StoredKeys(NamedTuple):
    """`Keys` of all layers of a segment as they lie in the cache: every array is [L,B,S,K,...]."""

    k: Float[Array, "L B S K h"] | Quantised
    v: Float[Array, "L B S K h"] | Quantised
    remembered: tuple[Any, ...]


class KvCache(NamedTuple):
    """Keys of all layers, by segments of the decoder. `info` are the token codes of the slots [B,S]; `index`
    [B] is each row's next free slot. Slots from there on hold leftovers that no query sees.
    """

    segments: tuple[StoredKeys, ...]
    info: TokenInfo
    index: Int[Array, "B"]

    @property
    def size(self) -> int:
        """Slots per row."""
        return self.info.segment.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def empty_cache(segments: tuple[Keys, ...], kind: CacheType) -> KvCache:
    """A cache with nothing in it, on the current mesh.

    Args:
        segments: shapes of the keys, [L,B,S,K,...] each, as the model computes them.
        kind: number type of k and v: as computed, bfloat16, or int8 with a float32 scale per token and kv head.
    """

    def kept(x: jax.ShapeDtypeStruct) -> Array | Quantised:
        if kind == "int8":
            return Quantised(jnp.zeros(x.shape, jnp.int8), jnp.zeros((*x.shape[:-1], 1), jnp.float32))
        return jnp.zeros(x.shape, jnp.bfloat16 if kind == "bfloat16" else x.dtype)

    def zeros(keys: Any) -> StoredKeys:
        remembered = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), keys.remembered)
        return StoredKeys(kept(keys.k), kept(keys.v), remembered)

    B, S = segments[0].k.shape[1:3]
    info = TokenInfo(*[jnp.zeros((B, S), jnp.int32)] * len(TokenInfo._fields))
    return placed(KvCache(tuple(map(zeros, segments)), info, jnp.zeros((B,), jnp.int32)))


def placed(cache: KvCache) -> KvCache:
    """The cache where the sharding rules want it: rows and kv heads are split, slots and layers are not."""

    def keys(x: Array) -> Array:
        return shard(x, "layers", "batch", "length", "kv_heads", *[None] * (x.ndim - 4))

    return KvCache(
        jax.tree.map(keys, cache.segments),
        jax.tree.map(lambda x: shard(x, "batch", "length"), cache.info),
        shard(cache.index, "batch"),
    )


def write(stored: StoredKeys, layer: Array, start: Int[Array, "B"], new: Keys) -> StoredKeys:
    """`stored` [L,B,S,...] with the keys `new` [B,T,...] of one layer in each row's slots start .. start + T - 1.

    A row whose run does not fit into the slots is left as it was.
    """

    def pack(x: Array, like: Array | Quantised) -> Any:
        return quantise(x) if isinstance(like, Quantised) else x

    packed = StoredKeys(pack(new.k, stored.k), pack(new.v, stored.v), new.remembered)
    return jax.tree.map(lambda old, run: _write_runs(old, layer, start, run), stored, packed)


def read(stored: StoredKeys, layer: Array, dtype: jnp.dtype) -> Keys:
    """The keys of one layer [B,S,...], k and v in `dtype`."""

    def unpack(x: Array | Quantised) -> Array:
        return x.values.astype(dtype) * x.scale.astype(dtype) if isinstance(x, Quantised) else x.astype(dtype)

    mine = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stored)
    return Keys(unpack(mine.k), unpack(mine.v), mine.remembered)


def write_info(held: TokenInfo, start: Int[Array, "B"], new: TokenInfo) -> TokenInfo:
    """`write` for the token codes [B,S]."""
    return jax.tree.map(lambda old, run: _write_runs(old[None], jnp.int32(0), start, run)[0], held, new)


def quantise(x: Float[Array, "*axes h"]) -> Quantised:
    """int8 with one scale per row of h numbers: the largest of them becomes 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    return Quantised(jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


def _write_runs(stored: Array, layer: Array, start: Int[Array, "B"], runs: Array) -> Array:
    """One scatter of B windows: a whole run moves at once, where an index per token would move one token at a time."""
    rows = jnp.arange(runs.shape[0], dtype=jnp.int32)
    at = jnp.stack([jnp.broadcast_to(layer, rows.shape), rows, start], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, runs.ndim)),
        inserted_window_dims=(0, 1),
        scatter_dims_to_operand_dims=(0, 1, 2),
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


def take(cache: KvCache, rows: Int[Array, "n"] | None, reach: int) -> KvCache:
    """A cache of its own with the first `reach` slots of `rows` (for numbers beyond them, of the last), or of all."""

    def cut(x: Array, axis: int) -> Array:
        x = jax.lax.slice_in_dim(x, 0, reach, axis=axis + 1)
        return x if rows is None else jnp.take(x, rows, axis=axis, mode="clip")

    index = cache.index if rows is None else jnp.take(cache.index, rows, mode="clip")
    segments = jax.tree.map(lambda x: cut(x, 1), cache.segments)
    return KvCache(segments, jax.tree.map(lambda x: cut(x, 0), cache.info), index)


def put(cache: KvCache, part: KvCache, rows: Int[Array, "n"] | None) -> KvCache:
    """`cache` with the slots that `take` gave written back. Rows numbered beyond the cache are dropped."""
    reach = part.size

    def back(x: Array, y: Array, axis: int) -> Array:
        if rows is None:
            return jax.lax.dynamic_update_slice_in_dim(x, y, 0, axis=axis + 1)
        where = (slice(None),) * axis + (rows, slice(0, reach))
        return x.at[where].set(y, mode="drop")

    index = part.index if rows is None else cache.index.at[rows].set(part.index, mode="drop")
    segments = jax.tree.map(lambda x, y: back(x, y, 1), cache.segments, part.segments)
    info = jax.tree.map(lambda x, y: back(x, y, 0), cache.info, part.info)
    return placed(KvCache(segments, info, index))
