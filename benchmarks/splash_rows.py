"""Static cycles of jax's own TPU attention kernels: each kernel of a training step with the best blocks of a list."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from estimates import MOST_STEPS, Blocks, Cost, Kernel, cost, described, row

from rave_jax.tools.tpu import Case, compile_cases

SIZES = (512, 1024)
PAIRS: list[Blocks] = [*itertools.product(SIZES, SIZES), (2048, 2048)]
"""Of a longer list, all pairs of 256 to 2048, one of these was the best on v5e and v6e at T 4096 and 8192."""
TRIPLES: list[Blocks] = [(q, k, compute) for q, k in PAIRS[:-1] for compute in SIZES if compute <= k]
TRIPLES.append((2048, 2048, 1024))
FLASH_PAIRS = PAIRS[:-1]

FORWARD = Kernel("splash forward", "plain_kernels:splash_forward", "splash_mqa_fwd", TRIPLES)
DQ = Kernel("splash dq", "plain_kernels:splash_dq", "splash_mqa_dq", PAIRS)
DKV = Kernel("splash dk, dv", "plain_kernels:splash_dkv", "splash_mqa_dkv", TRIPLES)
FUSED = Kernel(
    "splash dq, dk, dv", "plain_kernels:splash_dkv", "splash_mqa_dkv", TRIPLES, {"fused": True}, after="reduce"
)
KERNELS = (FORWARD, DQ, DKV, FUSED)
FLASH = {"forward": "flash_attention", "dq": "bwd_dq", "dkv": "bwd_dkv"}
"""Kernel of flash attention -> part of its name."""


class Plain(NamedTuple):
    """Cycles of a kv group without a gate."""

    name: str
    forward: float
    both: float
    """Forward and backward."""


class Splash:
    """Splash attention; what was best at one length is what is tried at the next."""

    def __init__(self, chip: str) -> None:
        self.chip = chip
        self.choices = {kernel: kernel.choices for kernel in KERNELS}

    def costs(self, length: int) -> dict[Kernel, Cost]:
        """Of each kernel."""
        found = {}
        for kernel in KERNELS:
            best, self.choices[kernel] = cost(self.chip, kernel, length, self.choices[kernel])
            if best is not None:
                found[kernel] = best
        return found


def splash(costs: dict[Kernel, Cost], heads: int) -> Plain:
    """The cheaper way to a whole step."""
    ways = [way for way in ((FORWARD, DQ, DKV), (FORWARD, FUSED)) if all(kernel in costs for kernel in way)]
    total, names = min((sum(costs[k].at(heads) for k in way), " + ".join(k.label for k in way)) for way in ways)
    return Plain(names, costs[FORWARD].at(heads), total)


def splash_rows(chip: str, where: str, costs: dict[Kernel, Cost], heads: int) -> Iterator[dict[str, Any]]:
    """Each kernel."""
    for kernel, found in costs.items():
        yield row(f"{kernel.label}, {where}", chip, round(found.at(heads)), "cycles", described(found))


def flash_parts(chip: str, length: int) -> dict[int, dict[str, int]]:
    """Number of heads -> cycles of the three kernels, each with its best blocks; empty where none compiles.

    Every head has keys of its own there, so it is no match; it is here so that nobody has to wonder.
    """
    tried: dict[str, list[tuple[int, Blocks]]] = {part: [] for part in FLASH}
    for pair in FLASH_PAIRS:
        if 2 * (length // pair[0]) * (length // pair[1]) <= MOST_STEPS:
            for part, cycles in _flash(chip, 2, length, dict.fromkeys(FLASH, pair)).items():
                tried[part].append((cycles, pair))
    if not all(tried.values()):
        return {}
    best = {part: min(found)[1] for part, found in tried.items()}
    made = {heads: _flash(chip, heads, length, best) for heads in (2, 3)}
    return made if all(made.values()) else {}


def flash(parts: dict[int, dict[str, int]], heads: int) -> Plain:
    """So many heads."""
    at = {part: two + (heads - 2) * (parts[3][part] - two) for part, two in parts[2].items()}
    return Plain("flash", at["forward"], sum(at.values()))


def _flash(chip: str, heads: int, length: int, blocks: dict[str, Blocks]) -> dict[str, int]:
    case = Case("flash", "plain_kernels:flash_step", {"heads": heads, "length": length, **blocks})
    result = compile_cases(chip, [case], cycles=True)["flash"]
    return {} if result.error else {part: result.kernel_cycles(op) for part, op in FLASH.items()}
