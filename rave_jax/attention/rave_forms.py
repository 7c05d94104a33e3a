"""The forms of RAVE's gate as score functions of its pair product.

The pair product is z = <u, w> + row + key in one: u, the row term and a one against w, a one and the key term. Each
form reads z times a constant of its own, `of_z`, which `query_side` takes into u, so that the tile does not multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention import ScoreFunction, Tile
from rave_jax.kernels.attention.score import LOG2E, Slopes
from rave_jax.typing import Array, Float

FLOOR = -69.0
"""A log gate shuts no further than e^-69, so that a kernel may multiply by it and no row loses all its weight."""
SHUT = -FLOOR * LOG2E - 1
"""The largest pair product of a log gate that is not clipped."""


class Form(ScoreFunction):
    """A form; `of_z` is the pair product's multiple of z."""

    ZERO_OFF = True
    """f(0) is exactly 0 in every form, so that a zero gate changes no bit."""

    @property
    def of_z(self) -> float:
        """The pair product, without OFFSET, divided by z."""
        return 1.0


@dataclass(frozen=True)
class LogGate(Form):
    """log(2 sigmoid(z)), a true multiplicative gate of at most 2.

    The pair product is -log2(e) z - 1, so that 2 sigmoid(z) = 1 / (1/2 + 2^pair): powers and logarithms of two are one
    operation each of a unit of their own on a TPU.
    """

    OFFSET: ClassVar[float] = -1.0

    @property
    def of_z(self) -> float:
        """The exponent of 2 that is e^-z."""
        return -LOG2E

    @property
    def bounds(self) -> tuple[float, float]:
        """Never shut further than e^FLOOR, and never above 2."""
        return FLOOR, math.log(2)

    def __call__(self, tile: Tile) -> Array:
        """log(2 sigmoid(z)), down to FLOOR."""
        assert tile.pair is not None
        return log_gate((tile.pair + 1) * (-1 / LOG2E))

    def log2(self, tile: Tile) -> Array:
        """log2(2 sigmoid(z)), by one power and one logarithm."""
        assert tile.pair is not None
        return -jnp.log2(0.5 + jnp.exp2(jnp.minimum(tile.pair, SHUT)))

    def factored(self, tile: Tile, reciprocal: Callable[[Array], Array]) -> tuple[Array, Slopes]:
        """2 sigmoid(z) = 1 / (1/2 + e) and its log's slope sigmoid(-z) = e / (1/2 + e) by one reciprocal, e = 2^pair;
        SHUT bounds e."""
        assert tile.pair is not None
        shut = jnp.exp2(jnp.minimum(tile.pair, SHUT))
        factor = reciprocal(0.5 + shut)
        return factor, Slopes(None, (shut * factor) * (-1 / LOG2E), {}, {}, {})


@dataclass(frozen=True)
class Tanh(Form):
    """limit * tanh(z / limit)."""

    limit: float = 4.0

    @property
    def of_z(self) -> float:
        """The tanh is of the pair product."""
        return 1 / self.limit

    @property
    def bounds(self) -> tuple[float, float]:
        """Plus and minus the limit."""
        return -self.limit, self.limit

    def __call__(self, tile: Tile) -> Array:
        """The bent z."""
        assert tile.pair is not None
        return self.limit * bend(tile.pair)

    def log2(self, tile: Tile) -> Array:
        """The same in log2 by one product."""
        assert tile.pair is not None
        return (self.limit * LOG2E) * bend(tile.pair)


@dataclass(frozen=True)
class Linear(Form):
    """z itself."""

    LINEAR: ClassVar[bool] = True

    def __call__(self, tile: Tile) -> Array:
        """The pair product."""
        assert tile.pair is not None
        return tile.pair


@dataclass(frozen=True)
class CenteredSigmoid(Form):
    """gain * (2 sigmoid(z) - 1), with a `gain` of each head."""

    @property
    def of_z(self) -> float:
        """2 sigmoid(z) - 1 = tanh(z / 2)."""
        return 0.5

    def __call__(self, tile: Tile) -> Array:
        """gain * tanh of the pair product."""
        assert tile.pair is not None
        return tile.head["gain"] * bend(tile.pair)

    def log2(self, tile: Tile) -> Array:
        """The constant joins the gain, a number of the head."""
        assert tile.pair is not None
        return (LOG2E * tile.head["gain"]) * bend(tile.pair)


@jax.custom_jvp
def bend(z: Array) -> Array:
    """tanh, with a slope of fewer operations than jax's."""
    return jnp.tanh(z)


@bend.defjvp
def _bend_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    bent = jnp.tanh(primals[0])
    return bent, tangents[0] * (1.0 - bent * bent)


@jax.custom_jvp
def log_gate(z: Array) -> Array:
    """log(2 sigmoid(z)), exactly 0 at 0 and accurate for all z down to FLOOR; its slope is sigmoid(-z).

    2 sigmoid(-|z|) = e^-|z| / (1 + (e^-|z| - 1) / 2), and the sign of z decides whether e^-|z| stays.
    """
    z = jnp.maximum(z, FLOOR)
    return jnp.minimum(z, 0.0) - jnp.log1p(0.5 * jnp.expm1(-jnp.abs(z)))


@log_gate.defjvp
def _log_gate_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (z,), (dz,) = primals, tangents
    return log_gate(z), jax.nn.sigmoid(-z) * dz


def query_side(
    form: Form, u: Float[Array, "B T H r"], row: Float[Array, "B T H"] | None, *, key_term: bool
) -> Float[Array, "B T H channels"]:
    """The query's side of the pair product: u, the row term where there is one, a one for a key term; all `of_z`."""
    ones = [jnp.ones_like(u[..., :1])] if key_term else []
    return jnp.concatenate([u, *([] if row is None else [row[..., None]]), *ones], axis=-1) * form.of_z


def key_side(
    w: Float[Array, "B S K r"], key: Float[Array, "B S K"] | None, *, row_term: bool
) -> Float[Array, "B S K channels"]:
    """The key's side of the pair product: w, a one for a row term, the key term where there is one."""
    ones = [jnp.ones_like(w[..., :1])] if row_term else []
    return jnp.concatenate([w, *ones, *([] if key is None else [key[..., None]])], axis=-1)
