"""What happens inside one tile, in units of log2: masks, the gate and its slope.

The exponent of a pair is x = log2(e) * (scale * <q, k> + bias + key bias). A gate comes from one small product
z' = <U_i, W_j> whose channels are u, the row term and a one against w, a one and the key term; switches are zeros in
them, so that z' is exactly 0 where the gate is off. z' is z times a constant of the form, taken into U; one channel
more adds a constant.

Operands in bfloat16 lose too much of a gate. Split into a rounded part and its rest, (a + a')(b + b') without a'b' is
one product over three times the channels, [a, a, a'] with [b, b', b]. A matrix unit is 128 or 256 deep, so up to
40 channels cost what one would.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention.base import LOG_GATE_FLOOR, PairForm
from rave_jax.typing import Array

LOG2E = math.log2(math.e)
LANES = 128
MASKED = -1e30
"""Exponent of a pair that may not see; and of a row before it has seen one."""
SHUT = LOG_GATE_FLOOR * -LOG2E - 1
"""The largest z' - 1 of a log gate."""
UNSEEN = 1e30
"""Log-sum-exp, in log2, of a row that saw nothing: every weight made from it is 0."""


def z_offset(form: PairForm) -> float:
    """What the product has beside z', everywhere: log_gate wants z' - 1."""
    return -1.0 if form.kind == "log_gate" else 0.0


def z_scale(form: PairForm, folded_into: float | None) -> float:
    """z' / z. A linear gate folded into a product that is scaled afterwards is divided by that scale."""
    if folded_into is not None:
        return 1 / folded_into
    return {
        "log_gate": -LOG2E,
        "tanh": 1 / form.limit,
        "linear": LOG2E,
        "centered_sigmoid": 0.5,
    }[form.kind]


def gate_shift(z: Array, form: PairForm, gain: Array | None) -> Array:
    """What a tile of z' adds to the exponent.

    log_gate, with z' = -log2(e) z: log2(2 sigmoid(z)) = -log2(1/2 + 2^(z' - 1)). The product gives z' - 1. Powers and
    logarithms of two are one operation each in a unit of their own, a division is many of the vector unit's.
    """
    if form.kind == "log_gate":
        return -jnp.log2(0.5 + jnp.exp2(jnp.minimum(z, SHUT)))
    if form.kind == "linear":
        return z
    if form.kind == "tanh":
        return (form.limit * LOG2E) * jnp.tanh(z)
    assert gain is not None
    return (LOG2E * gain) * jnp.tanh(z)


def bounded(form: PairForm) -> bool:
    """Is the shift so small that a row's maximum may leave it out? Then only the weight depends on the gate."""
    return form.kind == "log_gate" or (form.kind == "tanh" and form.limit <= 40)


class Slope(NamedTuple):
    """A gate once the row's log-sum-exp is known: weight = 2^(x + shift - lse) * factor; None: 0, or 1."""

    shift: Array | None
    factor: Array | None
    of_z: Array | float
    """d bias / d z' (of z' itself, not of z' - 1)."""
    of_gain: Array | None
    """d bias / d gain, in a form that has one."""


def gate_slope(z: Array, form: PairForm, gain: Array | None, exact: bool) -> Slope:
    """The gate of a tile of z', and its slopes.

    In log_gate one reciprocal gives both: 2 sigmoid(z) = 1 / (1/2 + e) and sigmoid(-z) = e / (1/2 + e), e = 2^(z' - 1).
    No weight is above one, and SHUT bounds e, so the power does not overflow.
    """
    if form.kind == "log_gate":
        shut = jnp.exp2(jnp.minimum(z, SHUT))
        factor = pltpu.reciprocal(0.5 + shut, approx=not exact)
        return Slope(None, factor, (shut * factor) * (-1 / LOG2E), None)
    if form.kind == "linear":
        return Slope(z, None, 1 / LOG2E, None)
    bent = jnp.tanh(z)
    steep = 1.0 - bent * bent
    if form.kind == "tanh":
        return Slope((form.limit * LOG2E) * bent, None, form.limit * steep, None)
    assert gain is not None
    return Slope((LOG2E * gain) * bent, None, gain * steep, bent)


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
