"""Sizes and arrays up to whole blocks."""

from __future__ import annotations

import jax.numpy as jnp

from rave_jax.typing import Array

SUBLANES = 8


def up(n: int, to: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // to) * to


def pad(x: Array, axis: int, size: int, value: float = 0) -> Array:
    """x with `axis` filled up to `size`."""
    missing = _missing(x, axis, size)
    return jnp.pad(x, missing, constant_values=value) if missing else x


def extend(x: Array, axis: int, size: int) -> Array:
    """x with its last entries repeated along `axis` up to `size`: numbers that a function is fit for."""
    missing = _missing(x, axis, size)
    return jnp.pad(x, missing, mode="edge") if missing else x


def _missing(x: Array, axis: int, size: int) -> list[tuple[int, int]] | None:
    count = size - x.shape[axis]
    return [(0, count if n == axis else 0) for n in range(x.ndim)] if count else None
