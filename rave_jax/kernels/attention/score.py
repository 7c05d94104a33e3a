"""Score functions: what a mechanism adds to a score, as a plain function of one tile that kernels trace into their own.

    bias_ij = f(dot_ij, <u_i, w_j>, features of i, features of j, numbers of the head)   where i and j are switched on,
                                                                                         else exactly 0

A function is jax operations, elementwise in the tile. It is computed at every pair of a tile, those that are switched
off, masked (as keys ahead of the query are) or padding (whose features are 0) included: it has to be finite there, and
so has its slope. Gradients of all float operands come from its vjp, which is traced into the tile as well.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.typing import Array, Bool, Float

LOG2E = math.log2(math.e)
LEAST, MOST = -69.0, 40.0
"""A bias between these, in logits, may be left out of a row's maximum: no row loses its weight by it, and no weight
overflows."""
NO_BOUNDS = (-math.inf, math.inf)


class Tile(NamedTuple):
    """What a score function reads of one tile: float32, each broadcasts against [..., queries, keys].

    Fields:
        dot: scale * <q, k>, in logits.
        pair: <u, w> + OFFSET of the function; None without u and w.
        query: features of the queries by name, [..., queries, 1] each.
        key: features of the keys by name, [..., 1, keys] each.
        head: numbers of the query head by name, [..., 1, 1] each.
    """

    dot: Array
    pair: Array | None
    query: dict[str, Array]
    key: dict[str, Array]
    head: dict[str, Array]


class Slopes(NamedTuple):
    """A number of each pair, or cotangent, for the fields of a `Tile`; a field that the bias does not depend on is None
    or absent."""

    dot: Array | None
    pair: Array | None
    query: dict[str, Array]
    key: dict[str, Array]
    head: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class ScoreFunction(ABC):
    """A score function with what kernels may know of it beforehand. A frozen dataclass whose fields are numbers or
    words: it is compared and hashed by them, and holds no arrays. A plain function of a `Tile` does as well
    (`function_of`)."""

    OFFSET: ClassVar[float] = 0.0
    """Added to <u, w> everywhere, switched on or off."""
    ZERO_OFF: ClassVar[bool] = False
    """Is the bias exactly 0 where <u, w> is 0, whatever the rest of the tile holds? Switches then cost nothing: they
    are zeros in u and w. `check` tries it."""
    LINEAR: ClassVar[bool] = False
    """Is the bias the pair product itself? It may then ride in further channels of <q, k>."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest bias, in logits. Within `LEAST` and `MOST`, a kernel leaves it out of the row's
        maximum. `check` tries them."""
        return NO_BOUNDS

    @abstractmethod
    def __call__(self, tile: Tile) -> Array:
        """The bias, in logits."""
        ...

    def log2(self, tile: Tile) -> Array:
        """The bias in units of log2; a function may save the constant."""
        return LOG2E * self(tile)

    def factored(self, tile: Tile, reciprocal: Callable[[Array], Array]) -> tuple[Array, Slopes] | None:
        """exp(bias) and the slopes d bias / d each field, where both come cheaper than the bias and its vjp; the
        default None has the vjp of `__call__` traced. Asked of functions within `LEAST` and `MOST` alone.

        Args:
            tile: see `Tile`.
            reciprocal: 1 / x, perhaps approximate.

        Returns:
            (exp(bias), slopes), or None.
        """
        return None

    @property
    def bounded(self) -> bool:
        """May a row's maximum leave the bias out?"""
        least, most = self.bounds
        return least >= LEAST and most <= MOST


@dataclasses.dataclass(frozen=True)
class Plain(ScoreFunction):
    """A plain function as a `ScoreFunction` of which nothing is known."""

    function: Callable[[Tile], Array]

    def __call__(self, tile: Tile) -> Array:
        """The function's own bias."""
        return self.function(tile)


def function_of(function: ScoreFunction | Callable[[Tile], Array]) -> ScoreFunction:
    """What kernels take: a plain function is wrapped.

    Raises:
        ValueError: it cannot be hashed, so no compiled program could be found by it; or it keeps something beside its
            fields, by which alone it is compared, and another's program would be found.
    """
    try:
        hash(function)
    except TypeError as error:
        raise ValueError(
            f"score function {name_of(function)} cannot be hashed; make it a function, or a frozen dataclass whose "
            "fields are numbers or words"
        ) from error
    if not isinstance(function, ScoreFunction):
        return Plain(function)
    fields = {field.name for field in dataclasses.fields(function)}

    def cached(name: str) -> bool:
        return isinstance(getattr(type(function), name, None), functools.cached_property)

    beside = [name for name in vars(function) if name not in fields and not cached(name)]
    if beside:
        raise ValueError(
            f"score function {name_of(function)} keeps {', '.join(beside)} beside the fields of a dataclass, by which "
            "score functions are told apart; make its class a frozen dataclass (@dataclass(frozen=True)) with a field "
            "for each"
        )
    return function


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["u", "w", "query", "key", "head", "query_on", "key_on"],
    meta_fields=["function"],
)
@dataclasses.dataclass(frozen=True)
class Term:
    """A score function and its operands, float32. It is a pytree of the operands; H query heads share the K heads of w
    and key features as they share keys.

    Fields:
        function: of a `Tile`.
        u, w: the pair product's sides; both or neither.
        query, key, head: what the function reads by name.
        query_on, key_on: where either is off, the term adds exactly 0, and tiles without a pair that is on are skipped;
            None is on everywhere.
    """

    function: ScoreFunction | Callable[[Tile], Array]
    u: Float[Array, "B T H r"] | None = None
    w: Float[Array, "B S K r"] | None = None
    query: Mapping[str, Float[Array, "B T H"]] = dataclasses.field(default_factory=dict)
    key: Mapping[str, Float[Array, "B S K"]] = dataclasses.field(default_factory=dict)
    head: Mapping[str, Float[Array, "H"]] = dataclasses.field(default_factory=dict)
    query_on: Bool[Array, "B T H"] | None = None
    key_on: Bool[Array, "B S"] | None = None

    def replace(self, **changed: Any) -> Term:
        """The same with other operands."""
        return dataclasses.replace(self, **changed)

    def of_queries(self) -> dict[str, Any]:
        """What belongs to queries, by name."""
        return {"u": self.u, "query": self.query, "query_on": self.query_on}

    def of_keys(self) -> dict[str, Any]:
        """What belongs to keys, by name."""
        return {"w": self.w, "key": self.key, "key_on": self.key_on}

    def map_queries(self, change: Callable[[Array], Array]) -> Term:
        """The same with every array of `of_queries` changed."""
        return self.replace(**jax.tree.map(change, self.of_queries()))

    def map_keys(self, change: Callable[[Array], Array]) -> Term:
        """The same with every array of `of_keys` changed."""
        return self.replace(**jax.tree.map(change, self.of_keys()))


class Shape(NamedTuple):
    """What a function's trace depends on: has it a pair product, and the names of its features."""

    pair: bool
    query: tuple[str, ...]
    key: tuple[str, ...]
    head: tuple[str, ...]

    @classmethod
    def of(cls, term: Term) -> Shape:
        """Of a term."""
        return cls(term.u is not None, *(tuple(sorted(names)) for names in (term.query, term.key, term.head)))

    def tile(self, make: Callable[..., Any], queries: int = 8, keys: int = 8) -> Tile:
        """A tile [queries, keys] of what `make` gives for each shape."""
        dot, pair = make((queries, keys)), make((queries, keys)) if self.pair else None
        parts = ((self.query, (queries, 1)), (self.key, (1, keys)), (self.head, (1, 1)))
        return Tile(dot, pair, *({name: make(shape) for name in names} for names, shape in parts))


@functools.cache
def reads_dot(function: ScoreFunction, shape: Shape) -> bool:
    """Does the function read the scaled product <q, k>? Found in its trace."""
    tile = shape.tile(lambda size: jax.ShapeDtypeStruct(size, jnp.float32))

    # The first input is dot, the first field of a tile.
    jaxpr = jax.make_jaxpr(function)(tile).jaxpr
    dot = jaxpr.invars[0]
    return any(x is dot for x in [*jaxpr.outvars, *(x for step in jaxpr.eqns for x in step.invars)])


@functools.cache
def check(function: ScoreFunction, shape: Shape) -> None:
    """Try a function on a small tile of random numbers: the type and shape that it gives, and what it declares.

    Raises:
        ValueError: names the function, what it did and what is expected.
    """
    # What jax is tracing, and on which mesh, belongs to a thread: the trial is no part of it.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(_try, function, shape).result()
        except jax.errors.UnexpectedTracerError as error:
            raise _with_arrays(function) from error


def _with_arrays(function: ScoreFunction) -> ValueError:
    return ValueError(
        f"score function {name_of(function)} holds parameters or other arrays of its own, which kernels cannot read "
        "and which get no gradients there; give them to its term, as u and w or as features by name (query, key, "
        "head), and write constants as Python numbers"
    )


def _try(function: ScoreFunction, shape: Shape) -> None:
    called, rng = name_of(function), np.random.default_rng(0)

    def draw(size: tuple[int, int]) -> np.ndarray:
        return (rng.normal(size=size) * 10 ** rng.uniform(-2, 2, size)).astype(np.float32)

    tile = shape.tile(draw, keys=12)
    try:
        program, given = jax.make_jaxpr(function, return_shape=True)(tile)
    except jax.errors.UnexpectedTracerError:
        raise
    except Exception as error:
        sides = ((name, of) for name, of in shape._asdict().items() if name != "pair")
        names = ", ".join(f"{side}: {', '.join(of) or 'none'}" for side, of in sides)
        raise ValueError(
            f"score function {called} fails on a tile with features {names}, {'a' if shape.pair else 'no'} pair "
            f"product: {type(error).__name__}: {error}"
        ) from error
    if _constants(program):
        raise _with_arrays(function)
    if not isinstance(given, jax.ShapeDtypeStruct) or given.dtype != jnp.float32:
        found = f"{given.dtype}" if isinstance(given, jax.ShapeDtypeStruct) else type(given).__name__
        raise ValueError(f"score function {called} gives {found}, expected a float32 array")
    whole = tile.dot.shape
    fits = zip(reversed(given.shape), reversed(whole), strict=False)
    if len(given.shape) > 2 or not all(size in (1, wanted) for size, wanted in fits):
        raise ValueError(
            f"score function {called} gives shape {given.shape} for a tile {whole}, expected one that broadcasts to "
            "the tile"
        )
    if function.ZERO_OFF and tile.pair is None:
        raise ValueError(f"score function {called} declares ZERO_OFF, but its term has no u and w")
    found, off, empty, ordered, part = jax.device_get(jax.jit(functools.partial(_tried, function))(tile))
    if not np.allclose(np.broadcast_to(found, whole)[PART], part, 1e-3, 1e-3, equal_nan=True):
        raise ValueError(
            f"score function {called} gives a pair another bias in another tile, expected one that depends on the pair "
            "alone: elementwise operations, none over queries or keys (sum, softmax, sort)"
        )
    (least, most), rounding = function.bounds, 1e-3
    if (least, most) != NO_BOUNDS and not ((found >= least - rounding) & (found <= most + rounding)).all():
        raise ValueError(
            f"score function {called} declares bounds {function.bounds}, but gives {found.min()} to {found.max()} on a "
            "tile of random numbers"
        )
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(empty)):
        raise ValueError(
            f"score function {called} or its slope is not finite where all features are 0, or the scores are too, as "
            "those of empty entries of a cache are; bound what it divides by, and what it takes roots and logarithms of"
        )
    # Features for which it is not finite either where no key is ahead are no places: nothing is known of them.
    behind = np.arange(whole[0])[:, None] >= np.arange(whole[1])
    places = np.isfinite(np.broadcast_to(ordered[0], whole)[behind]).all()
    if places and not all(np.isfinite(x).all() for x in jax.tree.leaves(ordered)):
        raise ValueError(
            f"score function {called} is finite where the features of a query are at least those of a key, and it or "
            "its slope is not where they are less; it is computed at masked pairs too, where a key lies ahead of its "
            "query: bound what it divides by, and what it takes roots and logarithms of, as in log(1 + max(i - j, 0))"
        )
    if function.ZERO_OFF and (off != 0).any():
        raise ValueError(f"score function {called} declares ZERO_OFF, but gives {off.ravel()[0]} where <u, w> is 0")


def _constants(program: Any) -> list[Any]:
    """Arrays that a program holds, those of inner programs among them."""
    inner = [value for step in program.jaxpr.eqns for value in step.params.values() if hasattr(value, "consts")]
    return [*program.consts, *(x for each in inner for x in _constants(each))]


PART = np.s_[3:, 5:]
"""Of the tile that functions are tried on."""


def _tried(function: ScoreFunction, tile: Tile) -> tuple[Array, Array, Any, Any, Array]:
    """The bias of a tile; where the pair product is 0; with its slopes where all features of tokens are 0, and of half
    of the keys the products too; with its slopes where features are small counts, as places are, in every order; and
    the bias of a part of the tile alone."""

    def with_slopes(tile: Tile) -> tuple[Array, Tile]:
        bias, pull = jax.vjp(lambda tile: function(tile), tile)
        return bias, pull(jnp.ones_like(bias))[0]

    query, key = ({name: jnp.zeros_like(x) for name, x in side.items()} for side in (tile.query, tile.key))
    dot = tile.dot.at[:, ::2].set(0.0)
    nothing = None if tile.pair is None else jnp.full_like(tile.pair, function.OFFSET)
    pair = None if tile.pair is None else tile.pair.at[:, ::2].set(function.OFFSET)
    empty = with_slopes(tile._replace(dot=dot, pair=pair, query=query, key=key))
    ordered = tile._replace(
        dot=jnp.zeros_like(dot),
        pair=nothing,
        query={name: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) for name, x in query.items()},
        key={name: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) for name, x in key.items()},
        head={name: jnp.ones_like(x) for name, x in tile.head.items()},
    )
    rows, columns = PART
    part = tile._replace(
        dot=tile.dot[PART],
        pair=None if tile.pair is None else tile.pair[PART],
        query={name: x[rows] for name, x in tile.query.items()},
        key={name: x[:, columns] for name, x in tile.key.items()},
    )
    off = tile._replace(pair=nothing)
    of_part = jnp.broadcast_to(function(part), part.dot.shape)
    return function(tile), function(off), empty, with_slopes(ordered), of_part


def name_of(function: ScoreFunction | Callable[[Tile], Array]) -> str:
    """What errors call a function."""
    inner = function.function if isinstance(function, Plain) else function
    return getattr(inner, "__qualname__", None) or type(inner).__qualname__
