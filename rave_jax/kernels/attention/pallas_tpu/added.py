"""A score term inside the kernels: what is kept of it for a block of queries, its bias in a tile, and its gradients.

Its function is traced into the tile, and in the backward kernel its vjp, or `factored`. Every field that it reads is a
whole tile [queries, keys]: features are columns and rows in every lane and sublane, which costs nothing, and a gradient
is a tile too, whose lanes or sublanes are then summed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention.pallas_tpu import tile
from rave_jax.kernels.attention.pallas_tpu.operands import Call
from rave_jax.kernels.attention.pallas_tpu.specs import Inputs
from rave_jax.kernels.attention.pallas_tpu.terms import TermCall
from rave_jax.kernels.attention.pallas_tpu.tile import LANES, LOG2E
from rave_jax.kernels.attention.pallas_tpu.traced import Added, Size, added_of, of_pair, shift_of
from rave_jax.kernels.attention.score import Slopes, Tile
from rave_jax.typing import Array, Float

Scratch = dict[str, Any]


def forward_scratch(call: Call, block_q: int) -> Scratch:
    """What is kept of the terms' query sides, by name and number of the term."""
    found = {}
    for n, term in enumerate(call.terms):
        columns = (call.G, block_q, LANES)
        if term.r is not None:
            found[f"U.{n}"] = pltpu.VMEM((call.G, block_q, term.channel_lanes), call.dtype)
        if term.kept_rows:
            found[f"rows.{n}"] = pltpu.VMEM((term.kept_rows, *columns), jnp.float32)
        if term.shape.head:
            found[f"heads.{n}"] = pltpu.VMEM((len(term.shape.head), *columns), jnp.float32)
    return found


def backward_scratch(call: Call, block_q: int, block_k: int) -> Scratch:
    """The same, and sums of the terms' gradients."""
    found, blocks = forward_scratch(call, block_q), call.S // block_k
    for n, term in enumerate(call.terms):
        columns = (call.G, block_q, LANES)
        if term.r is not None:
            channels = term.rounded_channels
            found[f"U_rows.{n}"] = pltpu.VMEM((call.G, channels, block_q), call.dtype)
            found[f"d_U.{n}"] = pltpu.VMEM((call.G, channels, block_q), jnp.float32)
            found[f"d_W.{n}"] = pltpu.VMEM((blocks, channels, block_k), jnp.float32)
        for side, names in (("rows", term.shape.query), ("heads", term.shape.head)):
            if names:
                found[f"d_{side}.{n}"] = pltpu.VMEM((len(names), *columns), jnp.float32)
        if term.shape.key:
            found[f"d_keys.{n}"] = pltpu.VMEM((blocks, len(term.shape.key), block_k), jnp.float32)
    return found


class Keys(NamedTuple):
    """A term's side of a block of keys."""

    W: Any
    """Channels of the pair product [channels, keys], float32 numbers that its type holds exactly; None without one."""
    rounded: Any
    """Channels of the products that make gradients."""
    columns: tuple[Float[Array, "1 keys"], ...]
    """Features, then the switch."""


@dataclass(frozen=True)
class Part:
    """One term in a kernel."""

    number: int
    term: TermCall
    call: Call
    inputs: Inputs
    scratch: Scratch

    def ref(self, name: str) -> Any:
        """An input of the term."""
        return self.inputs.refs[f"{name}.{self.number}"]

    def kept(self, name: str) -> Any:
        """A scratch array of the term."""
        return self.scratch[f"{name}.{self.number}"]

    def active(self, on: frozenset[int]) -> bool:
        """Is it to be taken where these switches are on?"""
        return self.term.switches is None or self.term.switches in on

    @property
    def dtype(self) -> jnp.dtype:
        """Of the products."""
        return jnp.dtype(self.call.dtype)

    def switch(self, n: Any) -> Array:
        """Of the queries of one head, [1, block_q]."""
        return self.ref("rows")[0, 0, pl.ds(len(self.term.shape.query) * self.call.G + n, 1)]

    def keep_queries(self, kv_head: Any) -> None:
        """What tiles read of the block of queries."""
        term, call = self.term, self.call
        for n in range(call.G):
            if term.r is not None:
                self._keep_channels(n)
            for row in range(term.kept_rows):
                self.kept("rows")[row, n] = tile.column(self.ref("rows")[0, 0, pl.ds(row * call.G + n, 1)])
            for number in range(len(term.shape.head)):
                shape = self.kept("heads").shape[2:]
                self.kept("heads")[number, n] = jnp.full(shape, self.ref("heads")[kv_head, number * call.G + n])

    def _keep_channels(self, n: int) -> None:
        term = self.term
        u = self.ref("u")[0, 0, n]
        if term.query_on and term.zeros:
            u = u * self.switch(n)
        rows = _with_channel(u, term.channels, term.function.OFFSET)
        scale = 1.0
        if term.linear:
            # What it adds is in log2, or is scaled afterwards as <q, k> is.
            scale = 1 / self.call.scale if term.folded else LOG2E
        U, lanes = tile.channels(rows * scale, "query", self.dtype), term.channel_lanes
        if U.shape[0] < lanes:
            U = jnp.concatenate([U, jnp.zeros((lanes - U.shape[0], U.shape[1]), jnp.float32)], axis=0)
        self.kept("U")[n] = U.T.astype(self.dtype)
        if f"U_rows.{self.number}" in self.scratch:
            self.kept("U_rows")[n] = tile.rounded_rows(rows, self.dtype)

    def keys(self) -> Keys:
        """Its side of the block of keys at hand."""
        term, W, rounded, columns = self.term, None, None, ()
        if term.r is not None:
            # A one against the function's offset, which may be 0.
            rows = _with_channel(self.ref("w")[0, 0], term.channels, 1.0)
            W, rounded = tile.channels(rows, "key", self.dtype), tile.rounded_rows(rows, self.dtype)
        if term.columns:
            columns = tuple(self.ref("keys")[0, 0, n : n + 1] for n in range(term.columns))
        return Keys(W, rounded, columns)

    def of_queries(self, n: Any, heads: int) -> Array:
        """The query side of the pair product for the n-th lot of heads, [heads * block_q, channel_lanes]."""
        U = self.kept("U")[pl.ds(n * heads, heads)]
        return U.reshape(-1, U.shape[-1])

    def pair(self, keys: Keys, n: Any, heads: int) -> Array:
        """<u, w> + OFFSET."""
        U = self.of_queries(n, heads)[:, : self.term.split_channels]
        return tile.product(U, keys.W.astype(U.dtype), (1, 0), interpreted=bool(self.call.interpret))

    def _tile(self, dot: Any, keys: Keys, n: Any, heads: int, size: Size) -> Tile:
        """What the function reads; `dot` None where it does not."""
        shape = self.term.shape

        def columns(name: str, names: tuple[str, ...]) -> dict[str, Array]:
            lots = (self.kept(name)[at, pl.ds(n * heads, heads)] for at in range(len(names)))
            return {name: tile.wide(x.reshape(-1, LANES), size[1]) for name, x in zip(names, lots, strict=True)}

        pair = self.pair(keys, n, heads) if shape.pair else None
        of_key = {name: jnp.broadcast_to(x, size) for name, x in zip(shape.key, keys.columns, strict=False)}
        return Tile(dot, pair, columns("rows", shape.query), of_key, columns("heads", shape.head))

    def _on(self, keys: Keys, n: Any, heads: int, size: Size) -> Array | None:
        """Where its bias is not set to 0; None is everywhere."""
        term, found = self.term, None
        if not term.masks:
            return None
        if term.query_on:
            column = self.kept("rows")[len(term.shape.query), pl.ds(n * heads, heads)]
            found = tile.wide(column.reshape(-1, LANES), size[1])
        if term.key_on:
            row = jnp.broadcast_to(keys.columns[-1], size)
            found = row if found is None else found * row
        assert found is not None
        return found > 0.5

    def shift(self, dot: Array | None, keys: Keys, n: Any, heads: int, size: Size) -> Array:
        """What it adds to the exponents."""
        if self.term.linear:
            return self.pair(keys, n, heads)
        return shift_of(self.term, self._tile(dot, keys, n, heads, size), self._on(keys, n, heads, size), size)

    def added(self, dot: Array | None, keys: Keys, n: Any, size: Size, exact: bool) -> Added:
        """The bias and its slopes of one head."""
        if self.term.linear:
            return Added(self.pair(keys, n, 1), None, of_pair)
        given, on = self._tile(dot, keys, n, 1, size), self._on(keys, n, 1, size)
        return added_of(self.term, given, on, size, exact=exact)

    def of_dot(self, gradients: Slopes) -> Array:
        """The gradient of scale * <q, k>, which the function reads."""
        assert gradients.dot is not None
        return _times(gradients.dot, self.term.unit)

    def add_gradients(self, gradients: Slopes, keys: Keys, n: Any, j: Any) -> None:
        """Sum the gradients of one head and block of keys, times 1 / `unit`."""
        shape, product = self.term.shape, functools.partial(tile.product, interpreted=bool(self.call.interpret))
        if gradients.pair is not None:
            d_pair = gradients.pair.astype(self.dtype)
            if not self.term.folded:
                self.kept("d_U")[n] += product(keys.rounded, d_pair, (1, 1))
            self.kept("d_W")[j] += product(self.kept("U_rows")[n], d_pair, (1, 0))
        for kind, names, given in (("rows", shape.query, gradients.query), ("heads", shape.head, gradients.head)):
            for at, name in enumerate(names):
                if name in given:
                    self.kept(f"d_{kind}")[at, n] += tile.fold_lanes(given[name])
        for at, name in enumerate(shape.key):
            if name in gradients.key:
                self.kept("d_keys")[j, at : at + 1] += jnp.sum(gradients.key[name], axis=0, keepdims=True)

    def write_queries(self, outputs: dict[str, Any], n: int) -> None:
        """Gradients of the block of queries, of one head."""
        term, block_q = self.term, self.call.backward[0]
        if term.r is not None:
            d_u = _times(self.kept("d_U")[n, : term.r], term.unit)
            outputs[f"u.{self.number}"][0, 0, n] = d_u * self.switch(n) if term.query_on and term.zeros else d_u
        for kind, names in (("rows", term.shape.query), ("heads", term.shape.head)):
            for at in range(len(names)):
                whole = jnp.sum(self.kept(f"d_{kind}")[at, n], axis=1, keepdims=True)
                row = jnp.broadcast_to(_times(whole, term.unit), (block_q, LANES)).T[:1]
                outputs[f"{kind}.{self.number}"][0, 0, pl.ds(at * self.call.G + n, 1)] = row

    def write_keys(self, outputs: dict[str, Any], j: Any) -> None:
        """Gradients of the block of keys."""
        term = self.term
        if term.r is not None:
            outputs[f"w.{self.number}"][0, 0] = _times(self.kept("d_W")[j, : term.r], term.unit)
        if term.shape.key:
            outputs[f"keys.{self.number}"][0, 0] = _times(self.kept("d_keys")[j], term.unit)


def parts_of(call: Call, inputs: Inputs, scratch: Scratch) -> list[Part]:
    """The call's terms in a kernel."""
    return [Part(n, term, call, inputs, scratch) for n, term in enumerate(call.terms)]


def _with_channel(rows: Float[Array, "r n"], channels: int, value: float) -> Float[Array, "channels n"]:
    """Rows filled up with zeros, the first of the new ones with a number."""
    missing = channels - rows.shape[0]
    if not missing:
        return rows
    sublane = jax.lax.broadcasted_iota(jnp.int32, (missing, rows.shape[1]), 0)
    return jnp.concatenate([rows, jnp.where(sublane == 0, value, 0.0)], axis=0)


def _times(x: Array, unit: float) -> Array:
    return x if unit == 1 else x * unit
