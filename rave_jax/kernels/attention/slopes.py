"""The bias of a score function in a tile, and how a cotangent of it becomes those of what the function reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention.score import ScoreFunction, Slopes, Tile
from rave_jax.typing import Array, Bool, Float


class Pulled(NamedTuple):
    """A bias and its pull: `bias`, or `factor` = exp(bias); the other is None. `pull` goes from the bias' cotangent to
    those of the tile's fields, without dot where the function does not read it."""

    bias: Float[Array, "*tile"] | None
    factor: Float[Array, "*tile"] | None
    pull: Callable[[Array], Slopes]


def bias_and_pull(
    function: ScoreFunction, reads_dot: bool, tile: Tile, on: Bool[Array, "*tile"] | None, *, factored: bool
) -> Pulled:
    """The bias where it is on, 0 elsewhere.

    Args:
        function: of the term.
        reads_dot: does it read the score?
        tile: what it reads.
        on: where the term adds something; None is everywhere.
        factored: may exp(bias) be given in place of the bias, where the function makes that?
    """
    found = function.factored(tile, reciprocal) if factored else None
    if found is not None:
        factor, slopes = found

        def pull(cotangent: Array) -> Slopes:
            return _times(cotangent if on is None else jnp.where(on, cotangent, 0.0), slopes, tile, reads_dot)

        return Pulled(None, factor if on is None else jnp.where(on, factor, 1.0), pull)

    def bias_of(dot: Array, rest: Tile) -> Array:
        bias = function(rest._replace(dot=dot))
        return jnp.broadcast_to(bias if on is None else jnp.where(on, bias, 0.0), tile.dot.shape)

    # A tile's dot takes part as an argument of its own: most functions do not read it.
    rest = tile._replace(dot=jnp.zeros(()))
    if reads_dot:
        bias, vjp = jax.vjp(bias_of, tile.dot, rest)

        def of_all(cotangent: Array) -> Slopes:
            dot, others = vjp(cotangent)
            return Slopes(dot, *others[1:])

        return Pulled(bias, None, of_all)
    bias, vjp = jax.vjp(lambda rest: bias_of(tile.dot, rest), rest)
    return Pulled(bias, None, lambda cotangent: Slopes(None, *vjp(cotangent)[0][1:]))


def reciprocal(x: Array) -> Array:
    """1 / x, for `ScoreFunction.factored`."""
    return 1 / x


def _times(cotangent: Array, slopes: Slopes, tile: Tile, reads_dot: bool) -> Slopes:
    """The cotangent times slopes, summed over what was broadcast; a field without a slope gets 0."""

    def of_field(x: Array, slope: Array | None) -> Array:
        if slope is None:
            return jnp.zeros_like(x)
        found = cotangent * slope
        axes = tuple(n for n, size in enumerate(x.shape) if size == 1 and found.shape[n] > 1)
        return jnp.sum(found, axis=axes, keepdims=True)

    def of_side(fields: dict[str, Array], own: dict[str, Array]) -> dict[str, Array]:
        return {name: of_field(x, own.get(name)) for name, x in fields.items()}

    return Slopes(
        dot=of_field(tile.dot, slopes.dot) if reads_dot else None,
        pair=None if tile.pair is None else of_field(tile.pair, slopes.pair),
        query=of_side(tile.query, slopes.query),
        key=of_side(tile.key, slopes.key),
        head=of_side(tile.head, slopes.head),
    )
