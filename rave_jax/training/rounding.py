"""Numbers kept between steps in fewer bits, so that what a step adds is not lost.

A moving average changes by less than half the distance of two bfloat16 or 8-bit numbers in a step. Rounded to the
nearest, it would stand still. Here a number between two neighbours goes to the upper one as often as it is near it,
by a sequence that is fixed by the step and the place in the array: the same on every mesh, and after a restart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.parallel.sharding import RULES, Axes
from rave_jax.typing import Array, Float, Int

SIGNED, UNSIGNED = 127, 255
"""Largest codes of int8 with a sign and of uint8 without."""
FEW = 4096
"""Arrays with fewer numbers stay float32, as in arXiv 2110.02861: norms and biases save no memory."""
MOST, LEAST = 128, 32
"""Numbers of a block. With fewer than 32 the scales would be an eighth of what the blocks save."""
WAYS = 8
"""Devices that an axis is shared by at most while blocks stay whole on each of them, where its size allows."""

_GOLDEN = 2654435769  # 2^32 / golden ratio: multiples of it are spread evenly over 32 bits
_PLACES = (2246822519, 3266489917, 668265263, 374761393, 2654435761, 1640531527)


class Quantised(NamedTuple):
    """An array in 8 bits.

    Fields:
        codes: int8 or uint8, in the array's shape.
        scales: the largest magnitude of each block. One axis has blocks for numbers, the others are the array's.
    """

    codes: Array
    scales: Array


class Blocks(NamedTuple):
    """How an array is cut: `size` numbers one behind another along `axis`."""

    axis: int
    size: int


def blocks_of(axes: Axes, shape: tuple[int, ...]) -> Blocks | None:
    """How an array with these logical axes is cut, or None where it stays float32.

    It does not depend on the mesh, so that a checkpoint fits every mesh. An axis that no mesh splits is taken first,
    and then one of `tensor`, of which a device has long pieces.
    """
    if math.prod(shape) < FEW:
        return None
    options = []
    for n, (name, size) in enumerate(zip(axes, shape, strict=True)):
        if name in ("layers", "experts"):
            continue
        rule = None if name is None else RULES[name]
        whole = [size] if rule is None and LEAST <= size <= 2 * MOST else []
        halves = [MOST >> k for k in range(int(math.log2(MOST // LEAST)) + 1)]
        found = whole + ([] if rule is None else [b for b in halves if size % (b * WAYS) == 0])
        found += [b for b in halves if size % b == 0]
        if found:
            order = 0 if rule is None else 1 if rule == "tensor" else 2
            options.append((order, n, found[0]))
    return Blocks(*min(options)[1:]) if options else None


def thresholds(shape: tuple[int, ...], step: Int[Array, ""]) -> Float[Array, "..."]:
    """Numbers in [0, 1), evenly spread over the steps at each place and without order over places."""
    place = jnp.zeros(shape, jnp.uint32)
    for n in range(len(shape)):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, n) * jnp.uint32(_PLACES[n])
    place ^= place >> 15
    place *= jnp.uint32(_PLACES[0])
    place ^= place >> 13
    return ((place + step.astype(jnp.uint32) * jnp.uint32(_GOLDEN)) >> 8).astype(jnp.float32) * 2.0**-24


def to_bfloat16(x: Float[Array, "..."], step: Int[Array, ""]) -> Float[Array, "..."]:
    """x in bfloat16, on average over the steps x itself.

    Args:
        x: float32, finite.
        step: number of the step.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = (thresholds(x.shape, step) * 2.0**16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + up) & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def quantised(x: Float[Array, "..."], blocks: Blocks, step: Int[Array, ""], *, signed: bool) -> Quantised:
    """x in 8 bits (blocks as in arXiv 2110.02861), on average over the steps x itself.

        |code| = 127 (|x| / scale)^(1/4), or 255 without a sign

    The fourth root takes the place of that paper's table: neighbours are 3 % (1.6 % without a sign) of the block's
    largest number apart at the top, less and less below, and the smallest above zero is 4e-9 (2e-10) of it.

    Args:
        x: float32, finite; at least 0 if not `signed`.
        blocks: of x.
        step: number of the step.
        signed: without a sign a number above 0 never becomes 0, since it is divided by.
    """
    axis = blocks.axis
    top = SIGNED if signed else UNSIGNED
    scales = jnp.max(_cut(jnp.abs(x), blocks), axis=axis + 1)
    share = jnp.abs(x) / _spread(jnp.where(scales > 0, scales, 1.0), x.shape, axis)
    # The lower neighbour; rounding of the root may put it one too low, where the rest is 1 and it goes up again.
    below = jnp.minimum(jnp.floor(top * jnp.sqrt(jnp.sqrt(share))), top - 1)
    low, high = (below / top) ** 4, ((below + 1) / top) ** 4
    code = below + (thresholds(x.shape, step) < (share - low) / (high - low))
    if signed:
        return Quantised((jnp.sign(x) * code).astype(jnp.int8), scales)
    return Quantised(jnp.where(x > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8), scales)


def restored(x: Quantised) -> Float[Array, "..."]:
    """The float32 numbers that the codes stand for."""
    codes = x.codes.astype(jnp.float32)
    top = SIGNED if x.codes.dtype == jnp.int8 else UNSIGNED
    axis = next(n for n, (a, b) in enumerate(zip(x.codes.shape, x.scales.shape, strict=True)) if a != b)
    return jnp.sign(codes) * (jnp.abs(codes) / top) ** 4 * _spread(x.scales, codes.shape, axis)


def nothing(shape: tuple[int, ...], blocks: Blocks, *, signed: bool) -> Quantised:
    """Zeros."""
    axis, size = blocks
    scales = (*shape[:axis], shape[axis] // size, *shape[axis + 1 :])
    return Quantised(jnp.zeros(shape, jnp.int8 if signed else jnp.uint8), jnp.zeros(scales, jnp.float32))


def _cut(x: Array, blocks: Blocks) -> Array:
    axis, size = blocks
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def _spread(scales: Array, shape: tuple[int, ...], axis: int) -> Array:
    """The scale of each number."""
    wide = jnp.expand_dims(scales, axis + 1)
    size = shape[axis] // scales.shape[axis]
    return jnp.broadcast_to(wide, (*wide.shape[: axis + 1], size, *wide.shape[axis + 2 :])).reshape(shape)
