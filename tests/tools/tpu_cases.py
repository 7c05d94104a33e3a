"""Programs for the tests of the TPU compiler's wrapper, each made as `compile_cases` wants it."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def double(place: Any, rows: int) -> tuple[Any, tuple[Any, ...]]:
    """Twice an array [rows, 128], eight rows a step; guarded by nothing."""

    def body(x: Any, out: Any) -> None:
        out[...] = x[...] * 2

    def call(x: jax.Array) -> jax.Array:
        spec = pl.BlockSpec((8, 128), lambda i: (i, 0))
        return pl.pallas_call(body, grid=(rows // 8,), in_specs=[spec], out_specs=spec, out_shape=x, name="double")(x)

    return call, (place((rows, 128), jnp.float32),)


def outer(place: Any, length: int) -> tuple[Any, tuple[Any, ...]]:
    """A product that stores [length, length]."""
    x = place((length, 64), jnp.float32)
    return lambda a, b: jnp.exp(a @ b.T).sum(0) @ jnp.exp(b @ a.T), (x, x)


def too_big(place: Any) -> tuple[Any, tuple[Any, ...]]:
    """A kernel that wants half a gibibyte of a chip's own memory."""

    def body(x: Any, out: Any, room: Any) -> None:
        room[:8, :128] = x[...]
        out[...] = room[:8, :128] * 2

    def call(x: jax.Array) -> jax.Array:
        return pl.pallas_call(body, out_shape=x, scratch_shapes=[pltpu.VMEM((131072, 1024), jnp.float32)])(x)

    return call, (place((8, 128), jnp.float32),)


def dies(place: Any) -> None:
    """Ends its process, as a compiler does that finds a fault of its own."""
    os.abort()


def hangs(place: Any) -> None:
    """Never comes back."""
    while True:
        pass
