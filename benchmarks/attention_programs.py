"""Our attention kernels as `compile_cases` takes them: forward and backward apart, over a causal grid known beforehand.

One kv group, heads of 128, bfloat16. Packed operands and blocks' facts are arguments of the program. What runs decides
from facts of the data which tiles to skip and where the gate is, which an estimate cannot know; so here the same guards
read the tile's place in the grid. Each kernel is compiled with blocks of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pallas_calls import Captured, captured

from rave_jax.attention.rave_forms import CenteredSigmoid, Form, Linear, LogGate, Tanh, key_side, query_side
from rave_jax.kernels.attention.base import MaskCodes, Terms
from rave_jax.kernels.attention.pallas_tpu import operands
from rave_jax.kernels.attention.pallas_tpu.backward import backward
from rave_jax.kernels.attention.pallas_tpu.blocks import BlockSizes, ByFacts, block_facts
from rave_jax.kernels.attention.pallas_tpu.forward import forward
from rave_jax.kernels.attention.score import Term

HEAD_DIM = 128
RANK = 16
Pass = Literal["forward", "backward"]
Gate = Literal["none", "log_gate", "tanh", "linear", "folded", "centered_sigmoid"]
"""`folded`: linear, in further channels of <q, k>."""
FORMS: dict[str, Form] = {
    "log_gate": LogGate(),
    "tanh": Tanh(),
    "linear": Linear(),
    "folded": Linear(),
    "centered_sigmoid": CenteredSigmoid(),
}
Tiles = Literal["gated", "plain", "all", "by facts"]
"""Tiles on and under the diagonal, with the gate, or without it though it is compiled in; or every tile of the grid,
not masked and without a gate: said by its place, or by facts. (The compiler's estimate takes every fact as 0, and zeros
say just that.)"""
Blocks = tuple[int, ...]
Program = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Place:
    """Guards that read a tile's place: a causal mask without padding."""

    i: Any
    j: Any
    blocks: Blocks
    tiles: Tiles

    def live(self) -> Any:
        block_q, block_k = self.blocks
        reached = self.j * block_k < (self.i + 1) * block_q
        return self.j >= 0 if self.tiles == "all" else reached

    def full(self) -> Any:
        block_q, block_k = self.blocks
        return self.j >= 0 if self.tiles == "all" else (self.j + 1) * block_k <= self.i * block_q + 1

    def on(self) -> Any:
        return jnp.where(self.j >= 0, 1, 0) if self.tiles == "gated" else jnp.where(self.j < 0, 1, 0)


@dataclasses.dataclass(frozen=True)
class ByPlace:
    """See `blocks.Visit`."""

    num_q: int
    num_k: int
    blocks: Blocks
    tiles: Tiles

    def guards(self, facts: Any, b: Any, i: Any, j: Any) -> Place:
        return Place(i, j, self.blocks, self.tiles)

    def key_block(self, facts: Any, b: Any, i: Any, j: Any) -> Any:
        if self.tiles == "all":
            # Always 0, and found at run time as it is by facts: a constant would spare the step all looking for copies.
            return jnp.minimum(j, jax.lax.div(i, 1 << 20))
        block_q, block_k = self.blocks
        # Not //, which asks for the sign and is more than a scalar unit wants to do here.
        return jnp.minimum(j, jax.lax.div(i * block_q + block_q - 1, block_k))


@dataclasses.dataclass(frozen=True)
class Operands:
    """A call, and its operands as abstract arrays."""

    call: operands.Call
    packed: operands.Packed
    codes: operands.Codes
    facts: tuple[Any, ...]


def make_operands(
    place: Any, heads: int, length: int, blocks: Blocks, gate: Gate = "none", tiles: Tiles = "gated"
) -> Operands:
    """Queries [1, length, heads, 128] over as many keys of one kv head."""
    q, kv = place((1, length, heads, HEAD_DIM), jnp.bfloat16), place((1, length, 1, HEAD_DIM), jnp.bfloat16)
    terms = terms_of(place, heads, length, gate)
    block_q, block_k = blocks
    blocks = (block_q, block_k)
    sizes = BlockSizes(blocks, blocks, fold_linear=gate == "folded")
    visit = ByFacts if tiles == "by facts" else functools.partial(ByPlace, blocks=blocks, tiles=tiles)
    call = operands.make_call(q, kv, kv, terms, HEAD_DIM**-0.5, sizes, interpret=False, visit=visit)

    def placed(make: Callable[..., Any], *args: Any) -> Any:
        return jax.tree.map(lambda x: place(x.shape, x.dtype), jax.eval_shape(make, *args))

    codes = codes_of(place, length)
    on = place((1, length), jnp.int32)
    return Operands(
        call,
        placed(lambda *args: operands.pack(*args, call), q, kv, kv, terms),
        placed(operands.pack_codes, codes),
        placed(lambda codes, on: block_facts(codes, on, on, block_q, block_k), codes, on),
    )


def terms_of(place: Any, heads: int, length: int, gate: Gate) -> Terms:
    """RAVE's term, with a query's and a key's term in its pair product."""
    if gate == "none":
        return Terms()

    def made(u: Any, w: Any, row: Any, key: Any, gain: Any, query_on: Any, key_on: Any) -> Term:
        u, w = query_side(FORMS[gate], u, row, key_term=True), key_side(w, key, row_term=True)
        head = {"gain": gain} if gate == "centered_sigmoid" else {}
        return Term(FORMS[gate], u, w, head=head, query_on=query_on, key_on=key_on)

    shapes = ((1, length, heads, RANK), (1, length, 1, RANK), (1, length, heads), (1, length, 1), (heads,))
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    switches = [jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in ((1, length, heads), (1, length))]
    term = jax.eval_shape(made, *floats, *switches)
    return Terms((jax.tree.map(lambda x: place(x.shape, x.dtype), term),))


def codes_of(place: Any, length: int) -> MaskCodes:
    """Mask codes of one row."""
    return MaskCodes(*(place((1, length), jnp.int32),) * 5)


def forward_program(place: Any, **arguments: Any) -> Program:
    """The forward kernel; `arguments` of `make_operands`."""
    return captured_forward(make_operands(place, **arguments)).block_by_block(place)


def backward_program(place: Any, **arguments: Any) -> Program:
    """The backward kernel; `arguments` of `make_operands`."""
    return captured_backward(make_operands(place, **arguments)).block_by_block(place)


def captured_forward(made: Operands) -> Captured:
    """The call of the forward kernel."""
    return captured(forward, made.packed, made.codes, made.facts, made.call)


def captured_backward(made: Operands) -> Captured:
    """The call of the backward kernel."""
    call = made.call
    d_out = jax.ShapeDtypeStruct((1, 1, call.G, call.T, call.c), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, 1, call.padded_group, call.T), jnp.float32)
    return captured(backward, made.packed, made.codes, made.facts, d_out, row, row, call)
