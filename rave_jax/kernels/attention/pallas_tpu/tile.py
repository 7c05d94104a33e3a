"""What happens inside one tile, in units of log2: masks, the channels of a pair product, columns and rows.

The exponent of a pair is x = log2(e) * (scale * <q, k> + biases + key bias). A pair product of few channels is made for
each term that has one (`added`).

Operands in bfloat16 lose too much of a bias. Split into a rounded part and its rest, (a + a')(b + b') without a'b' is
one product over three times the channels, [a, a, a'] with [b, b', b]. A matrix unit is 128 or 256 deep, so up to
40 channels cost what one would.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention.score import LOG2E
from rave_jax.typing import Array

LANES = 128
MASKED = -1e30
"""Exponent of a pair that may not see; and of a row before it has seen one."""
UNSEEN = 1e30
"""Log-sum-exp, in log2, of a row that saw nothing: every weight made from it is 0."""


def channels(rows: Array, side: Literal["query", "key"], dtype: jnp.dtype) -> Array:
    """U or W of a block, channels first: float32 numbers that `dtype` holds exactly.

    Args:
        rows: float32 [channels, block], a multiple of 8 channels.
        side: whose.
        dtype: of the product.

    Returns:
        [n, block]: n = channels, or three times that, rounded up to 16.
    """
    if dtype == jnp.float32:
        return rows
    rounded = rows.astype(jnp.bfloat16).astype(jnp.float32)
    rest = rows - rounded
    parts = [rounded, rounded, rest] if side == "query" else [rounded, rest, rounded]
    if 3 * rows.shape[0] % 16:
        parts.append(jnp.zeros((8, rows.shape[1]), jnp.float32))
    return jnp.concatenate(parts, axis=0)


def rounded_rows(rows: Array, dtype: jnp.dtype) -> Array:
    """Channels [n, block] in the type of a product, with n filled up to 16: half-width numbers lie in pairs of rows."""
    if dtype == jnp.float32 or rows.shape[0] % 16 == 0:
        return rows.astype(dtype)
    return jnp.concatenate([rows, jnp.zeros((8, rows.shape[1]), jnp.float32)], axis=0).astype(dtype)


def met(found: Array, count: int, split: bool) -> Array:
    """The gradient of U's channels [count, block] from that of what its product has, [n, block].

    The gradient of an operand a + a' comes from both parts of the other: b where a met b, b' where a met b'.
    """
    return found[:count] + found[count : 2 * count] if split else found[:count]


def beside(k: Array, W: Array) -> Array:
    """Keys [s, h] with their channels [n, s] beside them, filled up to whole lanes."""
    missing = -W.shape[0] % LANES
    if missing:
        W = jnp.concatenate([W, jnp.zeros((missing, W.shape[1]), jnp.float32)], axis=0)
    return jnp.concatenate([k, W.T.astype(k.dtype)], axis=1)


def mask(lo: Array, hi: Array, open_q: Array, order: Array, open_k: Array) -> Array:
    """What to add to an exponent: 0 or MASKED. Queries and keys are a column and a row, or a row and a column."""
    allow = ((lo <= order) & (order <= hi)) | (open_q == open_k)
    return jnp.where(allow, 0.0, MASKED)


def product(a: Array, b: Array, contract: tuple[int, int], interpreted: bool = False) -> Array:
    """a b summed in float32; float32 operands are multiplied whole. An interpreter makes float32 of all, which is the
    same product: XLA's CPU code has none of bfloat16 for some shapes."""
    if interpreted:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def exponent(product: Array, scale: float, keeps_dot: bool) -> tuple[Array | None, Array]:
    """(scale * <q, k> where it is wanted, the same in log2)."""
    if not keeps_dot:
        return None, product * (scale * LOG2E)
    dot = product * scale
    return dot, dot * LOG2E


def column(x: Array) -> Array:
    """A row [1, n] as a column in every lane [n, LANES]."""
    eight = jnp.broadcast_to(x, (8, x.shape[1]))
    return jnp.broadcast_to(eight.T[:, :1], (x.shape[1], LANES))


def wide(x: Array, width: int) -> Array:
    """A column kept in every lane, [n, LANES], for a tile of `width`."""
    if width == LANES:
        return x
    if width < LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES), axis=1)


def fold_lanes(x: Array) -> Array:
    """Sums of lanes that are LANES apart: [n, width] to [n, LANES]."""
    return functools.reduce(jnp.add, [x[:, n : n + LANES] for n in range(0, x.shape[1], LANES)])
