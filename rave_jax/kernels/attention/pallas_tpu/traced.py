"""A term's function traced into a kernel's tile, where every field is a whole tile: its bias in log2, and its slopes.

A linear term is no matter of this file: its bias is the pair product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention.pallas_tpu.terms import TermCall
from rave_jax.kernels.attention.pallas_tpu.tile import LOG2E
from rave_jax.kernels.attention.score import Slopes, Tile
from rave_jax.typing import Array, Bool

Size = tuple[int, ...]


class Added(NamedTuple):
    """What a term does to a tile of a backward kernel: weight = 2^(x + shift - lse) * factor; None: 0, or 1."""

    shift: Array | None
    factor: Array | None
    slopes: Callable[[Array], Slopes]
    """From d score the gradients of the fields, whole tiles, times 1 / `TermCall.unit`."""


def shift_of(term: TermCall, given: Tile, on: Bool[Array, "*tile"] | None, size: Size) -> Array:
    """What a term adds to the exponents.

    Args:
        term: not a linear one.
        given: what its function reads; dot may be None where it does not read it.
        on: where it adds something; None is everywhere.
        size: of the tile.
    """
    found = _whole(term.function.log2, size)(given)
    return found if on is None else jnp.where(on, found, 0.0)


def added_of(term: TermCall, given: Tile, on: Bool[Array, "*tile"] | None, size: Size, *, exact: bool) -> Added:
    """The same and its slopes; `exact` is whether a reciprocal may not be approximate."""

    def seen(x: Array, otherwise: float = 0.0) -> Array:
        return x if on is None else jnp.where(on, x, otherwise)

    if term.factored:
        found = term.function.factored(_with_dot(given, size), functools.partial(pltpu.reciprocal, approx=not exact))
        assert found is not None
        factor, slopes = found

        def of_factor(d: Array) -> Slopes:
            return jax.tree.map(lambda x: jnp.broadcast_to(seen(d) * x, size), slopes)

        return Added(None, seen(factor, 1.0), of_factor)
    shift, pull = jax.vjp(_whole(term.function.log2 if term.own_log2 else term.function, size), given)
    shift = shift if term.own_log2 else shift * LOG2E
    return Added(seen(shift), None, lambda d: Slopes(*pull(seen(d))[0]))


def of_pair(gradient: Array) -> Slopes:
    """The gradient of a pair product alone."""
    return Slopes(None, gradient, {}, {}, {})


def _whole(function: Callable[[Tile], Array], size: Size) -> Callable[[Tile], Array]:
    """A function that gives whole tiles."""
    return lambda given: jnp.broadcast_to(function(_with_dot(given, size)), size)


def _with_dot(given: Tile, size: Size) -> Tile:
    """A function that does not read <q, k> may ask for its shape all the same."""
    return given if given.dot is not None else given._replace(dot=jnp.zeros(size, jnp.float32))
