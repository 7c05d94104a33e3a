"""What the kernels share around their bodies: blocks of the inputs, how they are read, compiler parameters, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention.pallas_tpu import tile
from rave_jax.kernels.attention.pallas_tpu.operands import OF_KEYS, Call, Codes, Packed, kind
from rave_jax.kernels.attention.pallas_tpu.padding import SUBLANES
from rave_jax.typing import Array

VMEM_LIMIT = 100 * 2**20
"""Bytes a kernel may use; a tuning table must stay below what its chip has."""


class InputSpecs(NamedTuple):
    """Names of the inputs in their order, and their blocks."""

    names: tuple[str, ...]
    blocks: tuple[pl.BlockSpec, ...]

    def arrays(self, packed: Packed, codes: Codes, **more: Array) -> tuple[Array, ...]:
        """The inputs in their order."""
        known = packed | {"codes_q": codes.queries, "codes_k": codes.keys} | more
        return tuple(known[name] for name in self.names)


def input_specs(
    call: Call, block_q: int, block_k: int, at: Callable[..., tuple[Any, Any, Any, Any]], *more: str
) -> InputSpecs:
    """Blocks of the inputs that the call has; `at` gives (row, kv head, block of queries, block of keys) of a step.

    `more` names arrays of the backward pass: d_out [B,K,G,T,c], and lse and delta [B,K,G,T].
    """

    def of(shape: tuple[int, ...], index: Callable[[Any, Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *step: index(*at(*step)))

    G, Gp = call.G, call.padded_group

    def by_query(*rows: int) -> pl.BlockSpec:
        """Rows of a kv head with its queries in the lanes."""
        zeros = (0,) * len(rows)
        return of((1, 1, *rows, block_q), lambda b, n, i, j: (b, n, *zeros, i))

    def by_key(rows: int) -> pl.BlockSpec:
        return of((1, 1, rows, block_k), lambda b, n, i, j: (b, n, 0, j))

    found = {
        "codes_q": of((1, SUBLANES, block_q), lambda b, n, i, j: (b, 0, i)),
        "codes_k": of((1, SUBLANES, block_k), lambda b, n, i, j: (b, 0, j)),
        "q": of((1, 1, G, block_q, call.h), lambda b, n, i, j: (b, n, 0, i, 0)),
        "k": of((1, 1, block_k, call.h), lambda b, n, i, j: (b, n, j, 0)),
        "v": of((1, 1, block_k, call.c), lambda b, n, i, j: (b, n, j, 0)),
    }
    for n, term in enumerate(call.terms):
        if term.r is not None:
            found |= {f"u.{n}": by_query(G, term.r), f"w.{n}": by_key(term.r)}
        if term.rows:
            found[f"rows.{n}"] = by_query(term.rows * G)
        if term.columns:
            found[f"keys.{n}"] = by_key(term.columns)
        if term.shape.head:
            found[f"heads.{n}"] = pl.BlockSpec(memory_space=pltpu.SMEM)
    if call.key_bias:
        found["key_bias"] = by_key(Gp)
    backward = {
        "d_out": of((1, 1, G, block_q, call.c), lambda b, n, i, j: (b, n, 0, i, 0)),
        "lse": by_query(Gp),
        "delta": by_query(Gp),
    }
    found |= {name: backward[name] for name in more}
    return InputSpecs(tuple(found), tuple(found.values()))


@dataclass(frozen=True)
class Inputs:
    """The input refs of a kernel, by name, and what is read from them."""

    refs: dict[str, Any]

    def k(self) -> Array:
        """[block_k, h]."""
        return self.refs["k"][0, 0]

    def v(self) -> Array:
        """[block_k, c]."""
        return self.refs["v"][0, 0]

    def order(self) -> Array:
        """[1, block_k]."""
        return self.refs["codes_k"][0, 0:1]

    def open_k(self) -> Array:
        """[1, block_k]."""
        return self.refs["codes_k"][0, 1:2]

    def key_bias(self, n: Any, heads: int) -> Array:
        """[heads, block_k] of the n-th lot of heads."""
        return self.refs["key_bias"][0, 0, pl.ds(n * heads, heads)]

    def query_head(self, name: str, n: Any, heads: int) -> Array:
        """q or d_out of the n-th lot of heads, [heads * block_q, h]."""
        x = self.refs[name][0, 0, pl.ds(n * heads, heads)]
        return x.reshape(-1, x.shape[-1])

    def query_row(self, name: str, n: Any) -> Array:
        """A number of each query, [1, block_q]."""
        return self.refs[name][0, 0, pl.ds(n, 1)]

    def keep_queries(self, scratch: dict[str, Any], call: Call) -> None:
        """What belongs to the block of queries and is needed as columns, made once for all blocks of keys."""
        for n in range(3):
            scratch["bounds"][n] = tile.column(self.refs["codes_q"][0, n : n + 1])
        for n in range(call.G):
            for name in ("q", "d_out"):
                if name in scratch:
                    x = self.query_head(name, n, 1).astype(jnp.float32)
                    scratch[name][n] = x.T.astype(scratch[name].dtype)
            for name in ("lse", "delta"):
                if name in scratch:
                    scratch[name][n] = tile.column(self.query_row(name, n))


def compiler_params(in_turn: int) -> Any:
    """The last `in_turn` of the four grid axes are taken in their order; the others are independent."""
    semantics = ("parallel",) * (4 - in_turn) + ("arbitrary",) * in_turn
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def cost(
    call: Call,
    grid: tuple[int, ...],
    inputs: Sequence[Array],
    specs: InputSpecs,
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    products: int,
    pair_products: int,
) -> pl.CostEstimate:
    """The work where every block is visited; what is skipped is known at run time only."""
    pairs = call.B * call.K * call.G * call.T * call.S
    flops = 2 * pairs * call.h * products
    transcendentals = pairs
    for term in call.terms:
        transcendentals += pairs * term.transcendentals
        if term.r is not None:
            flops += 2 * pairs * term.split_channels * pair_products
    copied = 0
    for name, array, spec in zip(specs.names, inputs, specs.blocks, strict=True):
        block: Any = spec.block_shape
        numbers = array.size if block is None else _copies(name, grid) * math.prod(block)
        copied += numbers * array.dtype.itemsize
    copied += sum(x.size * x.dtype.itemsize for x in outputs)
    return pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=copied)


OF_ALL_HEADS = ("codes_q", "codes_k")
"""Inputs that all kv heads share."""


def _copies(name: str, grid: tuple[int, ...]) -> int:
    """How often the block of an input changes between two steps of the grid: it changes with the innermost axis that
    selects it and has more than one step, and with every step of the axes outside of that."""
    follows = [0, 3 if kind(name) in (*OF_KEYS, "codes_k") else 2]
    if name not in OF_ALL_HEADS:
        follows.append(1)
    quickest = max((axis for axis in follows if grid[axis] > 1), default=-1)
    return math.prod(grid[: quickest + 1])
