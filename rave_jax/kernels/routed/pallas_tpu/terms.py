"""Score terms over chosen regions: what is gathered with a query, what lies with the keys, and a tile of both.

All that the terms read of a query head is one row of 128 numbers (or of 256 and so on), so that it is one more load for
each gathered query; all that they read of a key is one row too. The channels of a pair product stand in the same lanes
of both, so one product of the two is <u, w>; a number of a query has a lane that is 0 in the keys' rows, and the other
way round. Numbers of a head are numbers of its queries.

The forward kernel has queries in the rows of a tile, the backward kernel has keys there. Functions are elementwise, and
every field that they read is a whole tile.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention.base import Terms, group_heads
from rave_jax.kernels.attention.pallas_tpu.padding import extend, pad, up
from rave_jax.kernels.attention.pallas_tpu.terms import TermCall, term_calls
from rave_jax.kernels.attention.pallas_tpu.tile import LANES, LOG2E, product
from rave_jax.kernels.attention.pallas_tpu.traced import Added, added_of, of_pair, shift_of
from rave_jax.kernels.attention.score import ScoreFunction, Slopes, Term, Tile
from rave_jax.typing import Array, Float

TermRows = tuple[Array, Array] | tuple[()]
"""Rows of queries [B,K,T,rows,width] and of keys by tile [B,K,tiles,lanes,width]; nothing without terms."""


@dataclass(frozen=True)
class PairItself(ScoreFunction):
    """The pair product as a bias."""

    ZERO_OFF: ClassVar[bool] = True
    LINEAR: ClassVar[bool] = True

    def __call__(self, tile: Tile) -> Array:
        """<u, w>."""
        assert tile.pair is not None
        return tile.pair


def without_key_bias(terms: Terms, T: int, K: int) -> Terms:
    """The same with a key bias as a term: a one for the query's head in its group, times the biases of its heads."""
    if terms.per_key is None:
        return terms
    B, S, H = terms.per_key.shape
    head = jnp.tile(jnp.eye(H // K), (K, 1))
    by_head = Term(PairItself(), jnp.broadcast_to(head, (B, T, H, H // K)), terms.per_key.reshape(B, S, K, H // K))
    return Terms((*terms.parts, by_head))


class Lanes(NamedTuple):
    """Where a term's numbers lie in the rows: the channels of its pair product, split (first, one behind the last), and
    lanes by name. A switch is called `on`."""

    pair: tuple[int, int] | None
    query: dict[str, int]
    key: dict[str, int]
    query_on: int | None
    key_on: int | None


@dataclass(frozen=True)
class RowTerms:
    """The terms of a call."""

    calls: tuple[TermCall, ...]

    @classmethod
    def of(cls, terms: Terms, dtype: str) -> RowTerms:
        """What is static of these."""
        return cls(term_calls(terms, dtype, fold_linear=False))

    def __bool__(self) -> bool:
        return bool(self.calls)

    @functools.cached_property
    def _laid(self) -> tuple[tuple[Lanes, ...], int]:
        """Lanes of each term, and how many are used."""
        found, numbers = [], itertools.count()
        for call in self.calls:
            pair = None
            if call.r is not None:
                own = [next(numbers) for _ in range(parts_of(call) * channels(call))]
                pair = own[0], own[-1] + 1
            query = {name: next(numbers) for name in (*call.shape.query, *map(of_head, call.shape.head))}
            key = {name: next(numbers) for name in call.shape.key}
            query_on, key_on = (next(numbers) if on and call.masks else None for on in (call.query_on, call.key_on))
            found.append(Lanes(pair, query, key, query_on, key_on))
        return tuple(found), next(numbers)

    @property
    def lanes(self) -> tuple[Lanes, ...]:
        """Of each term."""
        return self._laid[0]

    @property
    def numbers(self) -> int:
        """Lanes that are used."""
        return self._laid[1]

    @property
    def width(self) -> int:
        """Of a row: whole LANES."""
        return up(max(self.numbers, 1), LANES)

    @property
    def reads_dot(self) -> bool:
        """Does any function read <q, k>?"""
        return any(call.reads_dot for call in self.calls)

    def query_rows(
        self, terms: Terms, shape: tuple[int, ...], T: int, K: int, rows: int
    ) -> Float[Array, "B K T rows width"]:
        """What is gathered; plain jnp, which jax differentiates. A row without a head repeats the last head's: numbers
        that functions are fit for.

        Args:
            terms: the operands.
            shape: [B, tokens, H].
            T, K, rows: sizes to come.
        """
        columns = [] if self.numbers else [jnp.zeros((*shape, 1))]
        for term, call in zip(terms.parts, self.calls, strict=True):
            on = None if term.query_on is None else term.query_on.astype(jnp.float32)
            if term.u is not None:
                u = term.u if on is None or not call.zeros else term.u * on[..., None]
                columns.append(_split(_with_channel(u, call.function.OFFSET), call, "query"))
            columns += [term.query[name][..., None] for name in call.shape.query]
            columns += [jnp.broadcast_to(term.head[name], shape)[..., None] for name in call.shape.head]
            columns += [jnp.zeros((*shape, 1))] * len(call.shape.key)
            if call.masks and on is not None:
                columns.append(on[..., None])
            if call.masks and term.key_on is not None:
                columns.append(jnp.zeros((*shape, 1)))
        found = group_heads(extend(pad(jnp.concatenate(columns, axis=-1), 3, self.width), 1, T), K)
        return extend(jnp.moveaxis(found, 2, 3), 3, rows)

    def key_rows(self, terms: Terms, shape: tuple[int, ...]) -> Float[Array, "B S K width"]:
        """What lies with the keys, of `shape` [B, S, K]; plain jnp, which jax differentiates."""
        columns = [] if self.numbers else [jnp.zeros((*shape, 1))]
        for term, call in zip(terms.parts, self.calls, strict=True):
            on = None if term.key_on is None else term.key_on.astype(jnp.float32)[..., None]
            if term.w is not None:
                w = term.w if on is None or not call.zeros else term.w * on[..., None]
                columns.append(_split(_with_channel(w, 1.0 if call.function.OFFSET else 0.0), call, "key"))
            columns += [jnp.zeros((*shape, 1))] * (len(call.shape.query) + len(call.shape.head))
            columns += [term.key[name][..., None] for name in call.shape.key]
            if call.masks and term.query_on is not None:
                columns.append(jnp.zeros((*shape, 1)))
            if call.masks and on is not None:
                columns.append(jnp.broadcast_to(on, shape)[..., None])
        return pad(jnp.concatenate(columns, axis=-1), 3, self.width)

    def alone(self, rows: Array, number: int) -> Array:
        """Rows without the channels of other terms' pair products."""
        pairs = [lanes.pair for lanes in self.lanes if lanes.pair]
        own = self.lanes[number].pair
        if len(pairs) == 1 or own is None:
            return rows
        lane = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
        return jnp.where((lane >= own[0]) & (lane < own[1]), rows, 0.0)


NO_TERMS = RowTerms(())


class AddedByAll(NamedTuple):
    """What the terms do to a tile of the backward kernel, as `traced.Added` says of one."""

    shift: Array | None
    factor: Array | None
    slopes: tuple[Callable[[Array], Slopes], ...]
    """Of each term: from d score the gradients of its fields, whole tiles; a field without one is None or absent."""


@dataclass(frozen=True)
class Sides:
    """Rows of gathered queries and of a tile's keys, and the terms of all pairs of them.

    Fields:
        turned: the tile has keys in its rows.
        dtype: of products.
    """

    terms: RowTerms
    queries: Float[Array, "n width"]
    keys: Float[Array, "m width"]
    turned: bool
    dtype: jnp.dtype

    @property
    def size(self) -> tuple[int, int]:
        """Of the tile."""
        n, m = self.queries.shape[0], self.keys.shape[0]
        return (m, n) if self.turned else (n, m)

    @functools.cached_property
    def _across(self) -> Array:
        """The rows of the side that lies in the tile's lanes, as columns."""
        return (self.queries if self.turned else self.keys).T

    def _field(self, lane: int, *, of_query: bool) -> Array:
        """A number of each query, or key, as a tile."""
        if of_query == self.turned:
            return jnp.broadcast_to(self._across[lane : lane + 1], self.size)
        down = self.queries if of_query else self.keys
        return jnp.broadcast_to(down[:, lane : lane + 1], self.size)

    def pair(self, number: int) -> Array:
        """<u, w> + OFFSET of a term."""
        keys = self.terms.alone(self.keys, number).astype(self.dtype)
        queries = self.queries.astype(self.dtype)
        return product(keys, queries, (1, 1)) if self.turned else product(queries, keys, (1, 1))

    def _tile(self, number: int, dot: Array | None) -> Tile:
        call, lanes = self.terms.calls[number], self.terms.lanes[number]
        pair = self.pair(number) if call.shape.pair else None
        query = {name: self._field(lanes.query[name], of_query=True) for name in call.shape.query}
        key = {name: self._field(lane, of_query=False) for name, lane in lanes.key.items()}
        head = {name: self._field(lanes.query[of_head(name)], of_query=True) for name in call.shape.head}
        read: Any = dot if call.reads_dot else None
        return Tile(read, pair, query, key, head)

    def _on(self, number: int) -> Array | None:
        """Where a term's bias is not set to 0; None is everywhere."""
        lanes, found = self.terms.lanes[number], None
        if lanes.query_on is not None:
            found = self._field(lanes.query_on, of_query=True)
        if lanes.key_on is not None:
            of_key = self._field(lanes.key_on, of_query=False)
            found = of_key if found is None else found * of_key
        return None if found is None else found > 0.5

    def shift(self, dot: Array | None) -> Array:
        """What all terms add to the exponents."""
        return functools.reduce(jnp.add, (self._shift(number, dot) for number in range(len(self.terms.calls))))

    def _shift(self, number: int, dot: Array | None) -> Array:
        call = self.terms.calls[number]
        if call.linear:
            return self.pair(number) * LOG2E
        return shift_of(call, self._tile(number, dot), self._on(number), self.size)

    def added(self, dot: Array | None, *, exact: bool) -> AddedByAll:
        """The biases and their slopes."""
        found = [self._added(number, dot, exact) for number in range(len(self.terms.calls))]
        shift = _reduced(jnp.add, [one.shift for one in found])
        factor = _reduced(jnp.multiply, [one.factor for one in found])
        return AddedByAll(shift, factor, tuple(one.slopes for one in found))

    def _added(self, number: int, dot: Array | None, exact: bool) -> Added:
        call = self.terms.calls[number]
        if call.linear:
            return Added(self.pair(number) * LOG2E, None, of_pair)
        found = added_of(call, self._tile(number, dot), self._on(number), self.size, exact=exact)
        return found._replace(slopes=lambda d: found.slopes(d if call.unit == 1 else d * call.unit))

    def gradients(self, of: Sequence[Slopes]) -> tuple[Array, Array]:
        """Gradients of the rows of queries and of keys from those of the terms' fields; lanes that hold a constant may
        get anything. Keys have to be in the rows of the tile."""
        assert self.turned
        of_queries, of_keys = [], []
        for number, given in enumerate(of):
            call, lanes = self.terms.calls[number], self.terms.lanes[number]
            if given.pair is not None:
                d_pair = given.pair.astype(self.dtype)
                of_queries.append(product(d_pair, self.terms.alone(self.keys, number).astype(self.dtype), (0, 0)))
                of_keys.append(product(d_pair, self.terms.alone(self.queries, number).astype(self.dtype), (1, 0)))
            for names, fields, lane in (
                (call.shape.query, given.query, lambda name: name),
                (call.shape.head, given.head, of_head),
            ):
                for name in (name for name in names if name in fields):
                    ones = _ones(lanes.query[lane(name)], (self.size[0], self.terms.width), self.dtype)
                    of_queries.append(product(fields[name].astype(self.dtype), ones, (0, 0)))
            for name in (name for name in call.shape.key if name in given.key):
                ones = _ones(lanes.key[name], (self.size[1], self.terms.width), self.dtype)
                of_keys.append(product(given.key[name].astype(self.dtype), ones, (1, 0)))
        return _total(of_queries, self.queries.shape), _total(of_keys, self.keys.shape)


def of_head(name: str) -> str:
    """What a number of a head is called among those of its queries."""
    return f"head {name}"


def parts_of(call: TermCall) -> int:
    """How often a pair product's channels occur: in bfloat16 they are split, see `attention.pallas_tpu.tile`."""
    return 1 if call.dtype == "float32" else 3


def channels(call: TermCall) -> int:
    """Channels of a pair product before they are split: r, and one for the function's offset."""
    assert call.r is not None
    return call.r + bool(call.function.OFFSET)


def _with_channel(x: Float[Array, "*axes r"], value: float) -> Float[Array, "*axes channels"]:
    return jnp.concatenate([x, jnp.full((*x.shape[:-1], 1), value, x.dtype)], axis=-1) if value else x


def _split(x: Float[Array, "*axes r"], call: TermCall, side: str) -> Float[Array, "*axes n"]:
    """Channels of a pair product that its type holds exactly."""
    if parts_of(call) == 1:
        return x
    # Rounding has no slope of its own: the gradient of x comes by both parts.
    off = jax.lax.stop_gradient(x - jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
    return jnp.concatenate([x - off, x - off, off] if side == "query" else [x - off, off, x - off], axis=-1)


def _reduced(join: Callable[[Array, Array], Array], parts: list[Array | None]) -> Array | None:
    there = [x for x in parts if x is not None]
    return functools.reduce(join, there) if there else None


def _total(parts: list[Array], shape: tuple[int, ...]) -> Array:
    return functools.reduce(jnp.add, parts) if parts else jnp.zeros(shape, jnp.float32)


def _ones(lane: int, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Rows with a one in one lane: a product with them sums, and puts the sums into this lane."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, shape, 1) == lane, 1.0, 0.0).astype(dtype)
