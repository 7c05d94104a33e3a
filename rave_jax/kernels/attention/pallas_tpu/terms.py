"""What is static of a score term in the kernels: what it has, how its channels lie, and when its bias is added."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention.base import Terms
from rave_jax.kernels.attention.pallas_tpu.padding import SUBLANES, up
from rave_jax.kernels.attention.pallas_tpu.tile import LANES, LOG2E
from rave_jax.kernels.attention.score import LEAST, MOST, ScoreFunction, Shape, Term, function_of, reads_dot

TRANSCENDENTAL = frozenset(
    ("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "sin", "cos", "sqrt", "rsqrt", "pow")
)


@dataclass(frozen=True)
class TermCall:
    """One term of a call."""

    function: ScoreFunction
    r: int | None
    """Channels of u and w; None without a pair product."""
    shape: Shape
    """Of the function's tile: has it a pair product, and the names of its features."""
    query_on: bool
    key_on: bool
    """Has it switches of the queries; of the keys?"""
    switches: int | None
    """Which of the call's switches are its own; None where it has none. Terms may share them."""
    late: bool
    """The row's maximum leaves the bias out."""
    folded: bool
    """A linear term rides in further channels of <q, k>."""
    dtype: str
    """Of the products."""

    @property
    def linear(self) -> bool:
        """Is the bias <u, w> itself?"""
        return is_linear(self.function, self.shape)

    @property
    def zeros(self) -> bool:
        """Are switches zeros of u and w?"""
        return self.shape.pair and (self.function.ZERO_OFF or self.linear)

    @property
    def masks(self) -> bool:
        """Is the bias set to 0 where a switch is off?"""
        return self.switches is not None and not self.zeros

    @property
    def reads_dot(self) -> bool:
        """Does the function read <q, k>?"""
        return not self.linear and reads_dot(self.function, self.shape)

    @property
    def factored(self) -> bool:
        """Does the backward kernel take exp(bias) and its slopes of the function, and no vjp?"""
        return self.late and not self.linear and _gives_factor(self.function, self.shape)

    @property
    def own_log2(self) -> bool:
        """Has the function its own way in units of log2?"""
        return type(self.function).log2 is not ScoreFunction.log2

    @property
    def unit(self) -> float:
        """What the backward kernel multiplies its sums by at their end: it takes the slopes of what it adds."""
        return 1 / LOG2E if self.own_log2 and not self.factored and not self.linear else 1.0

    @property
    def rows(self) -> int:
        """Numbers of each query and head: features, then the switch."""
        return len(self.shape.query) + self.query_on

    @property
    def kept_rows(self) -> int:
        """Those of them that a tile reads."""
        return len(self.shape.query) + (self.query_on and self.masks)

    @property
    def columns(self) -> int:
        """Numbers of each key and kv head: features, then the switch where it is no zero of w."""
        return len(self.shape.key) + (self.key_on and self.masks)

    @property
    def channels(self) -> int:
        """Channels of the pair product before they are split: r, and one for the function's offset."""
        assert self.r is not None
        return up(self.r + bool(self.function.OFFSET), SUBLANES)

    @property
    def split_channels(self) -> int:
        """Channels of the pair product."""
        return self.channels if self.dtype == "float32" else up(3 * self.channels, 16)

    @property
    def channel_lanes(self) -> int:
        """The same up to whole lanes."""
        return up(self.split_channels, LANES)

    @property
    def rounded_channels(self) -> int:
        """Channels of the products that make the gradients of u and w."""
        return self.channels if self.dtype == "float32" else up(self.channels, 16)

    @property
    def numbers_of_key(self) -> int:
        """How many the backward kernel sums for each key."""
        return (self.rounded_channels if self.shape.pair else 0) + len(self.shape.key)

    @property
    def transcendentals(self) -> int:
        """What one pair takes of the unit of powers and logarithms."""
        return 0 if self.linear else _transcendentals(self.function, self.shape)


def term_calls(terms: Terms, dtype: str, fold_linear: bool) -> tuple[TermCall, ...]:
    """What is static of a call's terms.

    Biases that together stay between LEAST and MOST are left out of a row's maximum, the first terms first. One linear
    term is folded, unless a function reads <q, k>: it would find the bias in it.
    """
    functions = [(function_of(term.function), Shape.of(term)) for term in terms.parts]
    linear = [is_linear(*pair) for pair in functions]
    reading = any(not is_linear(*pair) and reads_dot(*pair) for pair in functions)
    folded = linear.index(True) if fold_linear and any(linear) and not reading else None
    numbers: dict[tuple[int, int], int] = {}
    made, least, most = [], 0.0, 0.0
    for n, (term, (function, shape)) in enumerate(zip(terms.parts, functions, strict=True)):
        bounds = least + min(function.bounds[0], 0.0), most + max(function.bounds[1], 0.0)
        late = bounds[0] >= LEAST and bounds[1] <= MOST
        least, most = bounds if late else (least, most)
        switches = None
        if term.query_on is not None or term.key_on is not None:
            switches = numbers.setdefault((id(term.query_on), id(term.key_on)), len(numbers))
        on = term.query_on is not None, term.key_on is not None
        r = None if term.u is None else term.u.shape[-1]
        made.append(TermCall(function, r, shape, *on, switches, late, n == folded, dtype))
    return tuple(made)


def is_linear(function: ScoreFunction, shape: Shape) -> bool:
    """Is the bias <u, w> itself?"""
    return shape.pair and function.LINEAR and not function.OFFSET


def switched(terms: Terms, calls: tuple[TermCall, ...]) -> Iterator[tuple[int, Term]]:
    """The call's switches by number, each with a term that has them."""
    seen = set()
    for term, call in zip(terms.parts, calls, strict=True):
        if call.switches is not None and call.switches not in seen:
            seen.add(call.switches)
            yield call.switches, term


def _abstract(shape: Shape) -> Any:
    make: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return shape.tile(make)


@functools.cache
def _gives_factor(function: ScoreFunction, shape: Shape) -> bool:
    return jax.eval_shape(lambda tile: function.factored(tile, lambda x: 1 / x), _abstract(shape)) is not None


@functools.cache
def _transcendentals(function: ScoreFunction, shape: Shape) -> int:
    return sum(name in TRANSCENDENTAL for name in _operations(jax.make_jaxpr(function.log2)(_abstract(shape)).jaxpr))


def _operations(jaxpr: Any) -> Iterator[str]:
    """Names of a program's operations, inner ones included."""
    for step in jaxpr.eqns:
        yield step.primitive.name
        for value in step.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _operations(inner)
