"""Regions in host memory, of which a device takes those that it reads.

A region's numbers lie end to end in whole tiles of 8 x 128, whatever their type: then the host and a TPU keep them in
one order, and a region, or a run of them, is one copy between the two. In other shapes the compiler brings the whole
array to the device to reorder it. A gather that the host computes does not help: according to its source, XLA rewrites
all of its operands, chosen or not, for each call.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.experimental.compute_on import compute_on

from rave_jax.typing import Array, Float, Int, Int8

TILE = (8, 128)
AT_ONCE = 8
"""Regions whose copies may be under way together."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tiles"], meta_fields=["entries", "channels"])
@dataclass(frozen=True)
class HostRegions:
    """Keys or values of several layers, by region, in host memory: [L,B,K,R,m,h]. What it gives lies on the device."""

    tiles: Float[Array, "L B K R X 8 128"] | Int8[Array, "L B K R X 8 128"]
    """The numbers; behind the m-th entry of a region there is nothing of meaning."""
    entries: int
    """m, of a region."""
    channels: int
    """h."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[L,B,K,R,m,h]."""
        return (*self.tiles.shape[:4], self.entries, self.channels)

    @property
    def dtype(self) -> jnp.dtype:
        """The number type."""
        return self.tiles.dtype

    def of_layer(self, layer: Int[Array, ""]) -> Float[Array, "B K R m h"] | Int8[Array, "B K R m h"]:
        """All regions of a layer."""
        return self._numbers(_to_device(jax.lax.dynamic_index_in_dim(self.tiles, layer, keepdims=False)))

    def listed(
        self, layer: Int[Array, ""], index: Int[Array, "B K n"], count: Int[Array, "B K"]
    ) -> Float[Array, "B K n m h"] | Int8[Array, "B K n m h"]:
        """The first `count` of the listed regions of a layer; what lies behind them is 0. Nothing else is copied."""
        (B, K, n), R = index.shape, self.tiles.shape[3]
        run = self._run()
        at = ((layer * B * K + jnp.arange(B * K, dtype=jnp.int32).reshape(B, K, 1)) * R + index).reshape(-1)
        meant = (jnp.arange(n) < count[..., None]).reshape(-1)
        total = jnp.sum(meant, dtype=jnp.int32)
        order = jnp.argsort(~meant, stable=True)

        def some(i: Array, out: Array) -> Array:
            # Where fewer are left, the last of them is copied again.
            places = [order[jnp.minimum(i * AT_ONCE + j, total - 1)] for j in range(AT_ONCE)]
            regions = [_to_device(jax.lax.dynamic_slice_in_dim(run, at[place], 1)) for place in places]
            for place, region in zip(places, regions, strict=True):
                out = jax.lax.dynamic_update_slice_in_dim(out, region, place, 0)
            return out

        out = jnp.zeros((B * K * n, *run.shape[1:]), run.dtype)
        out = jax.lax.fori_loop(0, -(-total // AT_ONCE), some, out)
        return self._numbers(out.reshape(B, K, n, *run.shape[1:]))

    def of_rows(self, rows: Int[Array, "N"], regions: int) -> Float[Array, "L N K r m h"] | Int8[Array, "L N K r m h"]:
        """The first `regions` of some rows (for numbers beyond them, of the last), in all layers."""
        L, B, K, R = self.tiles.shape[:4]
        run = self._run()
        heads = jnp.arange(L, dtype=jnp.int32)[:, None] * B + jnp.minimum(rows, B - 1)
        at = ((heads[..., None] * K + jnp.arange(K, dtype=jnp.int32)) * R).reshape(-1)

        def one(i: Array, out: Array) -> Array:
            first = _to_device(jax.lax.dynamic_slice_in_dim(run, at[i], regions))
            return jax.lax.dynamic_update_index_in_dim(out, first, i, 0)

        out = jnp.zeros((len(at), regions, *run.shape[1:]), run.dtype)
        out = jax.lax.fori_loop(0, len(at), one, out)
        return self._numbers(out.reshape(L, len(rows), K, *out.shape[1:]))

    def with_row(self, row: Int[Array, ""], new: Float[Array, "L K r m h"] | Int8[Array, "L K r m h"]) -> HostRegions:
        """With the first regions of one row, in all layers, replaced; in place where nothing else uses the array."""
        L, B, K, R, X = self.tiles.shape[:5]
        room = X * math.prod(TILE) // self.channels
        pieces = jnp.pad(new, [(0, 0)] * 3 + [(0, room - self.entries), (0, 0)])
        pieces = pieces.reshape(L * K, new.shape[2], X, *TILE)

        def one(i: Array, run: Array) -> Array:
            piece = jax.device_put(jax.lax.dynamic_index_in_dim(pieces, i, keepdims=False), jax.memory.Space.Host)
            return jax.lax.dynamic_update_slice_in_dim(run, piece, (((i // K) * B + row) * K + i % K) * R, 0)

        run = jax.lax.fori_loop(0, L * K, one, self._run())
        return replace(self, tiles=run.reshape(self.tiles.shape))

    def _run(self) -> Array:
        """All regions, one after another: the compiler makes no copy that is a slice of more than one axis."""
        return self.tiles.reshape(-1, *self.tiles.shape[4:])

    def _numbers(self, tiles: Array) -> Array:
        """Tiles [...,X,8,128] as [...,m,h]."""
        return tiles.reshape(*tiles.shape[:-3], -1, self.channels)[..., : self.entries, :]


def empty(shape: tuple[int, ...], dtype: jnp.dtype) -> HostRegions:
    """Zeros [L,B,K,R,m,h], made on the host: a device need not have room for them."""
    *axes, m, h = shape
    # Whole tiles, and whole entries in them.
    step = math.prod(TILE) // math.gcd(math.prod(TILE), h)
    X = -(-m // step) * step * h // math.prod(TILE)

    def zeros() -> Array:
        return jnp.zeros((*axes, X, *TILE), dtype)

    made = compute_on(zeros, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)
    return HostRegions(made(), m, h)


def _to_device(x: Array) -> Array:
    return jax.device_put(x, jax.memory.Space.Device)
