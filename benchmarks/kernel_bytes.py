"""Bytes that the grids of our TPU kernels copy, counted on concrete facts, and memory of whole steps at a long row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from estimates import ratio, row
from jax.experimental import pallas as pl
from pair_bias_programs import HEAD_DIM, Blocks, Gate, codes_of, make_operands, terms_of

from rave_jax.kernels.pair_bias import MaskCodes
from rave_jax.kernels.pair_bias.pallas_tpu import attention
from rave_jax.kernels.pair_bias.pallas_tpu.backward import backward
from rave_jax.kernels.pair_bias.pallas_tpu.blocks import block_facts
from rave_jax.kernels.pair_bias.pallas_tpu.forward import forward
from rave_jax.kernels.pair_bias.tuning import block_sizes
from rave_jax.tools.tpu import Case, Operand, compile_cases, copied_bytes

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
LONG = 32768
HEADS = 7


class _Recorded(Exception):
    """A Pallas call that was about to be made."""


class Recorded(NamedTuple):
    """What a Pallas call said of itself."""

    grid: tuple[int, ...]
    operands: list[Operand]
    declared: int
    """Bytes, of its cost estimate."""


def recorded(call: Callable[[], Any], scalars: int) -> Recorded:
    """The one Pallas call that `call` would make, its operands with blocks alone; `scalars` are prefetched."""

    def instead(_kernel: Any, *, grid_spec: Any, out_shape: Any, cost_estimate: Any, **_: Any) -> Any:
        def run(*args: Any) -> Any:
            inputs = zip(grid_spec.in_specs, args[scalars:], strict=True)
            both = [*inputs, *zip(grid_spec.out_specs, out_shape, strict=True)]
            found = [Operand.of(str(n), spec, x) for n, (spec, x) in enumerate(both) if spec.block_shape is not None]
            raise _Recorded(Recorded(tuple(grid_spec.grid), found, cost_estimate.bytes_accessed))

        return run

    with mock.patch.object(pl, "pallas_call", instead):
        try:
            call()
        except _Recorded as made:
            return made.args[0]
    raise ValueError("no Pallas call was made")


def abstract(shape: tuple[int, ...], dtype: Any) -> Any:
    """A `place` that is nowhere."""
    return jax.ShapeDtypeStruct(shape, dtype)


def causal(length: int) -> MaskCodes:
    """Codes of one row of text."""
    at = jnp.arange(length, dtype=jnp.int32)[None]
    return MaskCodes(jnp.zeros_like(at), at, at, jnp.full_like(at, -1), jnp.full_like(at, -2))


def copied(which: Literal["forward", "backward"], length: int, blocks: Blocks, gate: Gate) -> int:
    """Bytes of a causal row, by the index maps that run and the facts that they read."""
    made = make_operands(abstract, HEADS, length, blocks, gate, "by facts")
    on = jnp.ones((1, length), bool)
    facts = block_facts(causal(length), on, on, blocks[0], blocks[1])
    call = made.call
    x = abstract((1, 1, call.T // call.part_q, call.G, call.part_q, call.c), jnp.bfloat16)
    numbers = abstract((1, 1, call.T // call.part_q, call.padded_group, call.part_q), jnp.float32)
    if which == "forward":
        found = recorded(lambda: forward(made.packed, made.codes, facts, call), 2)
    else:
        found = recorded(lambda: backward(made.packed, made.codes, facts, x, numbers, numbers, call), 2)
    return sum(copied_bytes(found.grid, found.operands, facts).values())


def bytes_rows(chip: str, length: int) -> Iterator[dict[str, Any]]:
    """With and without a gate."""
    sizes = block_sizes(KINDS[chip])
    for which, blocks in (("forward", sizes.forward), ("backward", sizes.backward)):
        plain, gated = (copied(which, length, blocks, gate) for gate in ("none", "log_gate"))
        mib = {"plain_MiB": round(plain / 2**20, 1), "gated_MiB": round(gated / 2**20, 1), "blocks": blocks}
        yield ratio(f"{which}, {HEADS} heads, T {length}: bytes copied, gated to plain", chip, gated / plain, None, mib)


def long_step(place: Any, chip: str, gate: Gate) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward pass of the public layout over a long row."""
    q, kv = place((1, LONG, HEADS, HEAD_DIM), jnp.bfloat16), place((1, LONG, 1, HEAD_DIM), jnp.bfloat16)
    terms, form = terms_of(place, HEADS, LONG, gate)

    def run(q: Any, k: Any, v: Any, terms: Any, codes: Any, d_out: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, terms: Any) -> Any:
            blocks = block_sizes(KINDS[chip])
            return attention(q, k, v, codes, terms, form, HEAD_DIM**-0.5, blocks=blocks)[0]

        out, pull = jax.vjp(attend, q, k, v, terms)
        return out, pull(d_out)

    return run, (q, kv, kv, terms, codes_of(place, LONG), q)


SPLASH = {"forward": (1024, 1024, 512), "dq": (1024, 1024), "dkv": (1024, 1024, 1024)}


def memory_rows(chip: str) -> Iterator[dict[str, Any]]:
    """Temporaries of a step, and whether any array has all pairs."""
    splash = {"heads": HEADS, "length": LONG, **SPLASH}
    cases = [Case("splash", "plain_kernels:splash_step", splash)]
    cases.append(Case("splash, public layout", "plain_kernels:splash_step", splash | {"heads_last": True}))
    gates: tuple[Gate, ...] = ("none", "log_gate")
    cases += [Case(gate, "kernel_bytes:long_step", {"chip": chip, "gate": gate}) for gate in gates]
    found = compile_cases(chip, cases, hlo=True)
    size: dict[str, int] = {}
    for name, result in found.items():
        if result.memory is None:
            raise RuntimeError(f"{name}: {result.error}")
        size[name] = result.memory.temporaries
        operands = round((result.memory.arguments + result.memory.outputs) / 2**20, 1)
        label = name if name.startswith("splash") else f"ours, {name}"
        title = f"{label}: temporaries of forward and backward, {HEADS} heads, T {LONG}"
        yield row(title, chip, round(size[name] / 2**20, 1), "MiB", {"operands_and_results": operands})
    best = min(size["splash, public layout"], size["none"])
    name = f"temporaries with a gate, {HEADS} heads, T {LONG}, to the best plain kernel of the same layout"
    yield ratio(name, chip, size["log_gate"] / best, 1.1)
    maps = sum(sum(n >= LONG for n in x.shape) > 1 for x in found["log_gate"].arrays)
    yield row(f"arrays with two axes of T {LONG} or more", chip, maps, "arrays", None, "0", maps == 0)
