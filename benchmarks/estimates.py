"""Rows of static cycles: kernels with blocks to try, the cheapest of them, and how cycles grow with the heads.

Every head after the first two adds the same number of cycles, to 2 % where tried at seven, so two and three heads give
all. A gap under 3 % is a tie.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rave_jax.tools.tpu import Case, Compiled, Stretch, compile_cases

FINALISTS = 2
"""How many blocks, best at the first length, are tried at the next."""
MOST_STEPS = 1024
"""Grids with more take minutes to estimate."""
PATIENCE = 1200.0
"""Seconds for a case; on a busy machine a large kernel takes minutes."""
Blocks = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel of a training step.

    Args:
        label: of its rows.
        make: of its cases, "module:function".
        op: part of its name in the compiled program.
        choices: blocks to try.
        settings: further arguments of `make`.
        after: part of the name of an XLA op that belongs to it.
        heads_in_grid: a step of the grid takes one head.
    """

    label: str
    make: str
    op: str
    choices: Sequence[Blocks]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    after: str = ""
    heads_in_grid: bool = True

    def case(self, heads: int, length: int, blocks: Blocks) -> Case:
        """One program."""
        arguments = {"heads": heads, "length": length, "blocks": blocks, **self.settings}
        return Case(f"{self.label} {heads} {length} {blocks}", self.make, arguments)

    def steps(self, heads: int, length: int, blocks: Blocks) -> int:
        """Of the grid."""
        return (heads if self.heads_in_grid else 1) * -(-length // blocks[0]) * -(-length // blocks[1])

    def cycles(self, result: Compiled) -> int:
        """Of the kernel and what belongs to it."""
        return result.kernel_cycles(self.op) + (result.kernel_cycles(self.after) if self.after else 0)


class Best(NamedTuple):
    """Blocks of a kernel, and what the compiler said of them."""

    cycles: int
    blocks: Blocks
    result: Compiled


class Cost(NamedTuple):
    """Cycles of a kernel as they grow with the heads: each head after the first two adds the same."""

    two: float
    more: float
    blocks: Blocks
    stretch: Stretch

    def at(self, heads: int) -> float:
        """So many heads, two or more."""
        return self.two + (heads - 2) * self.more


def ranked(chip: str, kernel: Kernel, heads: int, length: int, choices: Sequence[Blocks]) -> list[Best]:
    """Choices that compile, best first. Some do not fit the chip, some kill the compiler or its estimate: what those
    said goes to standard error."""
    cases = {choice: kernel.case(heads, length, choice) for choice in choices}
    small = [case for choice, case in cases.items() if kernel.steps(heads, length, choice) <= MOST_STEPS]
    results = compile_cases(chip, small, cycles=True, bundles=True, limit=PATIENCE)
    for name, result in results.items():
        if result.error:
            print(f"{chip}, {name}: {result.error.strip().splitlines()[-1][:300]}", file=sys.stderr, flush=True)
    found = [(choice, results[case.name]) for choice, case in cases.items() if case.name in results]
    good = [Best(kernel.cycles(result), choice, result) for choice, result in found if not result.error]
    return sorted(good, key=lambda best: best.cycles)


def cost(chip: str, kernel: Kernel, length: int, choices: Sequence[Blocks]) -> tuple[Cost | None, list[Blocks]]:
    """The cheapest choice, and the best few in order; None where none compiles."""
    tried = ranked(chip, kernel, 2, length, choices)
    if not tried:
        return None, list(choices)
    best = tried[0]
    third = ranked(chip, kernel, 3, length, [best.blocks])[0]
    stretch = best.result.kernel_bundles(kernel.op).longest
    return Cost(best.cycles, third.cycles - best.cycles, best.blocks, stretch), [b.blocks for b in tried[:FINALISTS]]


def row(
    name: str,
    where: str,
    value: float,
    unit: str,
    more: Mapping[str, Any] | None = None,
    aim: str = "",
    holds: bool = True,
) -> dict[str, Any]:
    """A row of results, printed as it comes.

    Args:
        name: of the row.
        where: a chip that is compiled for, or the device that ran.
        value: measured.
        unit: of it.
        more: to know about it.
        aim: in words; "" where there is none.
        holds: does the value meet it?
    """
    versions = " ".join(f"{package} {_version(package)}" for package in ("jax", "libtpu"))
    value = round(value, 3) if isinstance(value, float) else value
    verdict = f" (aim {aim}{'' if holds else ': MISSED'})" if aim else ""
    print(f"{name}, {where}: {value:,} {unit}{verdict} {json.dumps(more) if more else ''}", flush=True)
    made = {"name": name, "where": f"{where}, {versions}", "value": value, "unit": unit, "aim": aim, "holds": holds}
    return {**made, **(more or {})}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def unmeasured(name: str, most: float | None, why: str) -> dict[str, Any]:
    """A row of a ratio that this machine cannot give."""
    aim = "" if most is None else f"<= {most}"
    print(f"{name}: unmeasured, {why}{f' (aim {aim})' if aim else ''}", flush=True)
    return {"name": name, "where": why, "value": None, "unit": "x", "aim": aim, "holds": None, "unmeasured": why}


def ratio(
    name: str, where: str, value: float, most: float | None, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A row of a ratio that should be no more than `most`."""
    aim, holds = ("", True) if most is None else (f"<= {most}", bool(value <= most))
    return row(name, where, value, "x", more, aim, holds)


def described(found: Cost) -> dict[str, Any]:
    """Blocks, and what bounds the work of a tile."""
    used = {slot: round(share, 2) for slot, share in found.stretch.used.items() if share >= 0.005}
    stretch = {"bundles": found.stretch.bundles, "fullest": found.stretch.fullest, "spills": found.stretch.spills}
    return {"blocks": found.blocks, **stretch, "used": used}
