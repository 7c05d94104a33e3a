"""Programs for the tests of the TPU compiler's wrapper, each made as `compile_cases` wants it."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


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
    """A kernel whose one block does not fit."""

    def body(x: Any, out: Any) -> None:
        out[...] = x[...] * 2

    return lambda x: pl.pallas_call(body, out_shape=x)(x), (place((16384, 8192), jnp.float32),)


def dies(place: Any) -> None:
    """Ends its process, as a compiler does that finds a fault of its own."""
    os.abort()


def hangs(place: Any) -> None:
    """Never comes back."""
    while True:
        pass
