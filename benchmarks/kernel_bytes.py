"""Bytes that the grids of our TPU kernels copy, counted on concrete facts, and memory of whole steps at a long row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from attention_programs import (
    HEAD_DIM,
    Blocks,
    Gate,
    captured_backward,
    captured_forward,
    codes_of,
    make_operands,
    terms_of,
)
from estimates import ratio, row

from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.attention.pallas_tpu import attention
from rave_jax.kernels.attention.pallas_tpu.blocks import block_facts
from rave_jax.kernels.attention.tuning import block_sizes
from rave_jax.tools.tpu import Case, compile_cases, copied_bytes

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
LONG, LONGEST = 32768, 131072
HEADS = 7


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
    on = jnp.ones((1, length), jnp.int32)
    facts = block_facts(causal(length), on, on, blocks[0], blocks[1])
    found = captured_forward(made) if which == "forward" else captured_backward(made)
    return sum(copied_bytes(found.grid_spec.grid, found.operands, facts).values())


def bytes_rows(chip: str, length: int) -> Iterator[dict[str, Any]]:
    """With and without a gate."""
    sizes = block_sizes(KINDS[chip])
    for which, blocks in (("forward", sizes.forward), ("backward", sizes.backward)):
        plain, gated = (copied(which, length, blocks, gate) for gate in ("none", "log_gate"))
        mib = {"plain_MiB": round(plain / 2**20, 1), "gated_MiB": round(gated / 2**20, 1), "blocks": blocks}
        yield ratio(f"{which}, {HEADS} heads, T {length}: bytes copied, gated to plain", chip, gated / plain, None, mib)


def long_step(place: Any, chip: str, gate: Gate, length: int) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward pass of the public layout over a long row."""
    q, kv = place((1, length, HEADS, HEAD_DIM), jnp.bfloat16), place((1, length, 1, HEAD_DIM), jnp.bfloat16)
    terms = terms_of(place, HEADS, length, gate)

    def run(q: Any, k: Any, v: Any, terms: Any, codes: Any, d_out: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, terms: Any) -> Any:
            blocks = block_sizes(KINDS[chip])
            return attention(q, k, v, codes, terms, HEAD_DIM**-0.5, blocks=blocks)[0]

        out, pull = jax.vjp(attend, q, k, v, terms)
        return out, pull(d_out)

    return run, (q, kv, kv, terms, codes_of(place, length), q)


SPLASH = {"forward": (1024, 1024, 512), "dq": (1024, 1024), "dkv": (1024, 1024, 1024)}


def memory_rows(chip: str) -> Iterator[dict[str, Any]]:
    """Temporaries of a step in HBM, and whether any array has all pairs. The compiler keeps small arrays on the chip;
    those are in the peak alone, if in anything."""
    splash = {"heads": HEADS, "length": LONG, **SPLASH}
    cases = [Case("splash", "plain_kernels:splash_step", splash)]
    cases.append(Case("splash, public layout", "plain_kernels:splash_step", splash | {"heads_last": True}))
    steps: list[tuple[Gate, int]] = [("none", LONG), ("log_gate", LONG), ("log_gate", LONGEST)]
    for gate, length in steps:
        arguments = {"chip": chip, "gate": gate, "length": length}
        cases.append(Case(f"ours, {gate}, {length}", "kernel_bytes:long_step", arguments))
    found = compile_cases(chip, cases, hlo=True)
    size: dict[str, int] = {}
    for case in cases:
        name, result = case.name, found[case.name]
        if result.memory is None:
            raise RuntimeError(f"{name}: {result.error}")
        size[name] = result.memory.temporaries
        operands = result.memory.arguments + result.memory.outputs
        parts = {"operands_and_results": operands, "peak_beyond_them": result.memory.peak - operands}
        more = {part: round(count / 2**20, 1) for part, count in parts.items()}
        title = f"{name}: temporaries of forward and backward, {HEADS} heads, T {case.arguments['length']}"
        yield row(title, chip, round(size[name] / 2**20, 1), "MiB", more)
    gated, plain = size[f"ours, log_gate, {LONG}"], size[f"ours, none, {LONG}"]
    name = f"temporaries with a gate, {HEADS} heads, T {LONG}, to splash of the same layout"
    more = {"to_ours_without": round(gated / plain, 3), "MiB_more_than_ours_without": round((gated - plain) / 2**20, 1)}
    yield ratio(name, chip, gated / size["splash, public layout"], 1.1, more)
    maps = sum(sum(n >= LONG for n in x.shape) > 1 for gate, n in steps for x in found[f"ours, {gate}, {n}"].arrays)
    yield row(f"arrays with two axes of T {LONG} or more", chip, maps, "arrays", None, "0", maps == 0)
