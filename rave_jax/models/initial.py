"""Random starting weights that compile fast.

A model has dozens of differently shaped parameters, and every jax.random draw of a new shape costs the compiler about
a third of a second; here a draw is one small elementwise kernel. Numbers are the element's index, mixed with the key by
an integer hash (the 32-bit finaliser of C. Wellons' hash-prospector, in public domain), made normal by inversion.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from rave_jax.typing import Array


def normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Array:
    """Independent normal numbers of mean 0, one for each element, that depend on the key and the shape alone."""
    words = jax.random.key_data(key)
    index = jax.lax.iota(jnp.uint32, math.prod(shape))
    mixed = _mix(_mix(index ^ words[0]) + words[1])
    # The middle of one of 2^24 equal intervals of (-1, 1): never an end, where the inverse is infinite.
    uniform = (mixed >> 8).astype(jnp.float32) * 2.0**-23 - (1 - 2.0**-24)
    return (std * math.sqrt(2) * jax.lax.erf_inv(uniform)).reshape(shape).astype(dtype)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
