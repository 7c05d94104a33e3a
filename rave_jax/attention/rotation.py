"""Rotary position applied: pairs of a head's numbers are turned by angles.

The head's halves are paired (x[i], x[i + h/2]), as in HF's Llama and Qwen code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rave_jax.typing import Array, Float, Int


class Rotation(NamedTuple):
    """Cosine and sine of each pair's angle, float32."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


class Rope(NamedTuple):
    """What the angles of a layer's queries were made from: a pair turns by its frequency times its position, one of the
    three. So to move a token by n, in all three, is to turn its pairs by n times their frequencies."""

    positions: Int[Array, "3 B T"]
    frequencies: Float[Array, "half"]


def rotate(x: Float[Array, "B T H h"], rotation: Rotation) -> Float[Array, "B T H h"]:
    """Turn each pair of x by its angle, in float32; x's number type comes back. Numbers of x behind the pairs that the
    rotation has angles for stay as they are."""
    return _turned(x, rotation.cos[..., None, :], rotation.sin[..., None, :])


def moved(x: Float[Array, "B T H h"], by: Int[Array, "B T H"], rope: Rope) -> Float[Array, "B T H h"]:
    """x, rotated already, as if each head stood `by` positions further on."""
    angles = by[..., None].astype(jnp.float32) * rope.frequencies
    return _turned(x, jnp.cos(angles), jnp.sin(angles))


def _turned(x: Float[Array, "B T H h"], cos: Float[Array, "..."], sin: Float[Array, "..."]) -> Float[Array, "B T H h"]:
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
