"""The key/value cache as a pytree: dense slots per row, with un-rotated keys where a mechanism reads them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rave_jax.batch import TokenInfo
from rave_jax.typing import Array, Float, Int


class KvCache(NamedTuple):
    """Keys and values of all layers. The rotated keys of slot s belong to the token that stands s-th in its row.

    `k0` (keys before RoPE) is None unless a mechanism scores pairs. `index` is the next free slot of each row.
    """

    k: Float[Array, "L B S K h"]
    v: Float[Array, "L B S K h"]
    k0: Float[Array, "L B S K h"] | None
    info: TokenInfo
    index: Int[Array, "B"]

    @property
    def size(self) -> int:
        """Slots per row."""
        return self.k.shape[2]


def empty_cache(
    num_layers: int, batch: int, size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype, keep_pre_rope: bool
) -> KvCache:
    """A cache with nothing in it."""
    shape = (num_layers, batch, size, num_kv_heads, head_dim)
    zeros = jnp.zeros((batch, size), jnp.int32)
    return KvCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        k0=jnp.zeros(shape, dtype) if keep_pre_rope else None,
        info=TokenInfo(*[zeros] * len(TokenInfo._fields)),
        index=jnp.zeros((batch,), jnp.int32),
    )


def write_slots(cached: Array, new: Array, slots: Int[Array, "B T"]) -> Array:
    """`cached` [B,S,...] with `new` [B,T,...] at each row's slots; slots beyond the cache are dropped."""
    rows = jnp.arange(cached.shape[0])[:, None]
    return cached.at[rows, slots].set(new.astype(cached.dtype), mode="drop")


def write_info(cached: TokenInfo, new: TokenInfo, slots: Int[Array, "B T"]) -> TokenInfo:
    """`write_slots` for the token codes."""
    return TokenInfo(*(write_slots(c, n, slots) for c, n in zip(cached, new, strict=True)))
