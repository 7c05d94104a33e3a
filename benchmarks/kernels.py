"""TPU attention kernels without a TPU: the compiler's static cycles, what bounds them, and memory.

Rows compare within one chip, and a gap under 3 % is a tie: an estimate is not a time, and knows nothing of contention
for memory. The plain kernels are jax's splash and flash attention, with the best blocks of a list:
each kernel of a training step has its own. Every head after the first two adds the same number of cycles (to 2 % where
tried at seven), so that two and three heads give all; with one head a grid has a loop less, and is cheaper.

    python benchmarks/kernels.py [--json FILE] [--chips v5e v6e] [--lengths 4096 8192]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rave_jax.tools.tpu import Case, Compiled, Stretch, compile_cases

GROUPS = {"7B": 7, "3B": 8}
"""Model -> query heads that share a key head."""
SIZES = (256, 512, 1024, 2048)
FINALISTS = 2
"""How many blocks, best at the first length, are tried at the next."""
MOST_STEPS = 1024
"""Grids with more take minutes to estimate."""
LONG = 32768
Blocks = tuple[int, ...]

PAIRS = list(itertools.product(SIZES, SIZES))
TRIPLES = [(q, k, compute) for q, k in PAIRS for compute in SIZES if compute <= k]


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel of a training step.

    Args:
        label: of its rows.
        make: of its cases, in plain_kernels.py.
        op: part of its name in the compiled program.
        choices: blocks to try.
        settings: further arguments of `make`.
        after: part of the name of an XLA op that belongs to it.
    """

    label: str
    make: str
    op: str
    choices: Sequence[Blocks]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    after: str = ""

    def case(self, heads: int, length: int, blocks: Blocks) -> Case:
        """One program."""
        arguments = {"heads": heads, "length": length, "blocks": blocks, **self.settings}
        return Case(f"{self.label} {heads} {length} {blocks}", f"plain_kernels:{self.make}", arguments)

    def cycles(self, result: Compiled) -> int:
        """Of the kernel and what belongs to it."""
        return result.kernel_cycles(self.op) + (result.kernel_cycles(self.after) if self.after else 0)


FORWARD = Kernel("splash forward", "splash_forward", "splash_mqa_fwd", TRIPLES)
DQ = Kernel("splash dq", "splash_dq", "splash_mqa_dq", PAIRS)
DKV = Kernel("splash dk, dv", "splash_dkv", "splash_mqa_dkv", TRIPLES)
FUSED = Kernel("splash dq, dk, dv", "splash_dkv", "splash_mqa_dkv", TRIPLES, {"fused": True}, "reduce")
KERNELS = (FORWARD, DQ, DKV, FUSED)


class Best(NamedTuple):
    """The cheapest blocks of a kernel, and what the compiler said of them."""

    cycles: int
    blocks: Blocks
    result: Compiled


def steps(heads: int, length: int, blocks: Blocks) -> int:
    """Of the grid."""
    return heads * -(-length // blocks[0]) * -(-length // blocks[1])


def ranked(chip: str, kernel: Kernel, heads: int, length: int, choices: Sequence[Blocks]) -> list[Best]:
    """Choices that compile, best first. Some do not fit the chip; some kill the estimate."""
    cases = {choice: kernel.case(heads, length, choice) for choice in choices}
    small = [case for choice, case in cases.items() if steps(heads, length, choice) <= MOST_STEPS]
    results = compile_cases(chip, small, cycles=True, bundles=True)
    found = [(choice, results[case.name]) for choice, case in cases.items() if case.name in results]
    good = [Best(kernel.cycles(result), choice, result) for choice, result in found if not result.error]
    return sorted(good, key=lambda best: best.cycles)


def row(name: str, chip: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
    """A row of results, printed as it comes."""
    versions = " ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "libtpu"))
    made = {"name": name, "where": f"{chip} (compiled, not run), {versions}", "value": value, "unit": unit}
    print(f"{name}, {chip}: {value:,} {unit} {json.dumps(more) if more else ''}", flush=True)
    return {**made, "aim": "", "holds": True, **more}


class Cost(NamedTuple):
    """Cycles of a kernel as they grow with the heads: each head after the first two adds the same."""

    two: int
    more: int
    blocks: Blocks
    stretch: Stretch

    def at(self, heads: int) -> int:
        """So many heads, two or more."""
        return self.two + (heads - 2) * self.more


def cost(chip: str, kernel: Kernel, length: int, choices: Sequence[Blocks]) -> tuple[Cost, list[Blocks]]:
    """The cheapest choice, and the best few in order."""
    tried = ranked(chip, kernel, 2, length, choices)
    best = tried[0]
    third = ranked(chip, kernel, 3, length, [best.blocks])[0]
    stretch = best.result.kernel_bundles(kernel.op).longest
    return Cost(best.cycles, third.cycles - best.cycles, best.blocks, stretch), [b.blocks for b in tried[:FINALISTS]]


def splash_rows(chip: str, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Cycles of splash attention, each kernel and the cheaper way to a whole step."""
    choices = {kernel: kernel.choices for kernel in KERNELS}
    for length in lengths:
        best: dict[Kernel, Cost] = {}
        for kernel in KERNELS:
            best[kernel], choices[kernel] = cost(chip, kernel, length, choices[kernel])
        for model, heads in GROUPS.items():
            where = f"{model} group ({heads} heads), T {length}"
            for kernel, found in best.items():
                yield row(f"{kernel.label}, {where}", chip, found.at(heads), "cycles", **described(found))
            ways = [(FORWARD, DQ, DKV), (FORWARD, FUSED)]
            total, way = min((sum(best[k].at(heads) for k in way), " + ".join(k.label for k in way)) for way in ways)
            yield row(f"splash forward and backward, {where}", chip, total, "cycles", kernels=way)


def described(found: Cost) -> dict[str, Any]:
    """Blocks, and what bounds the work of a tile."""
    used = {slot: round(share, 2) for slot, share in found.stretch.used.items() if share >= 0.005}
    stretch = {"bundles": found.stretch.bundles, "fullest": found.stretch.fullest, "spills": found.stretch.spills}
    return {"blocks": found.blocks, **stretch, "used": used}


FLASH = {"forward": "flash_attention", "dq": "bwd_dq", "dkv": "bwd_dkv"}
"""Kernel of flash attention -> part of its name."""


def flash_cycles(chip: str, heads: int, length: int, choices: Sequence[dict[str, Blocks]]) -> list[dict[str, int]]:
    """Cycles of the three kernels in a step with each choice of blocks for them; choices that fail are left out."""
    settings = {"heads": heads, "length": length}
    cases = [Case(str(n), "plain_kernels:flash_step", settings | blocks) for n, blocks in enumerate(choices)]
    good = [result for result in compile_cases(chip, cases, cycles=True).values() if not result.error]
    return [{part: result.kernel_cycles(op) for part, op in FLASH.items()} for result in good]


def flash_rows(chip: str, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Cycles of flash attention, whose every head has keys of its own."""
    found: dict[str, list[tuple[int, Blocks]]] = {part: [] for part in FLASH}
    for pair in PAIRS:
        if steps(2, lengths[0], pair) <= MOST_STEPS:
            for cycles in flash_cycles(chip, 2, lengths[0], [dict.fromkeys(FLASH, pair)]):
                for part in FLASH:
                    found[part].append((cycles[part], pair))
    best = {part: min(tried)[1] for part, tried in found.items()}
    for length in lengths:
        if len(both := [c for heads in (2, 3) for c in flash_cycles(chip, heads, length, [best])]) == 2:
            two, three = both
            for model, heads in GROUPS.items():
                where = f"{model} group ({heads} heads), T {length}"
                parts = {part: two[part] + (heads - 2) * (three[part] - two[part]) for part in FLASH}
                yield row(f"flash forward, {where}", chip, parts["forward"], "cycles", blocks=best["forward"])
                name = f"flash forward and backward, {where}"
                yield row(name, chip, sum(parts.values()), "cycles", blocks=best, parts=parts)


def memory_rows(chip: str) -> Iterator[dict[str, Any]]:
    """Temporaries of a step over a long row, beyond its operands, results and nothing else."""
    case = Case(
        "long",
        "plain_kernels:splash_step",
        {"heads": 7, "length": LONG, "forward": (1024, 1024, 512), "dq": (1024, 1024), "dkv": (1024, 1024, 1024)},
    )
    result = compile_cases(chip, [case])["long"]
    if result.memory is None:
        raise RuntimeError(result.error)
    operands = round((result.memory.arguments + result.memory.outputs) / 2**20, 1)
    value = round(result.memory.temporaries / 2**20, 1)
    name = f"splash forward and backward, 7 heads, T {LONG}: temporaries"
    yield row(name, chip, value, "MiB", operands_and_results=operands)


def main() -> None:
    """Estimate and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="Static cycles of TPU attention kernels.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"], help="chips to compile for")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192], help="T, queries and keys")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for chip in args.chips:
        for made in itertools.chain(memory_rows(chip), splash_rows(chip, args.lengths), flash_rows(chip, args.lengths)):
            rows.append(made)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
