"""Our TPU attention kernels beside the best plain kernel, without a TPU: the compiler's static cycles, bytes, memory.

Rows compare within one chip, and a gap under 3 % is a tie: an estimate is not a time, and knows nothing of contention
for memory. Kernels are compiled over a causal grid whose guards read a tile's place, because an estimate cannot know
the facts of data: c0 without a gate, c1 with it in every tile. A batch with visual share f costs (1 - f) c0 + f c1 and
what the guards' own tests cost: the difference of two grids that visit every tile, by its place and by facts. The
best plain kernel is the cheapest of jax's splash and flash attention and our own without a gate, each with the best
blocks of its list. What lies before and after the kernels in a model is in none of them.

The `xla` backend is timed on the device that jax finds, a CPU or a GPU.

    python benchmarks/kernels.py [--json FILE] [--chips v5e v6e] [--memory v5e v6e] [--lengths 4096 8192] [--ours]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attention_programs import Blocks, Gate, Tiles
from estimates import Cost, Kernel, cost, described, ranked, ratio, row
from kernel_bytes import KINDS, bytes_rows, memory_rows
from kernel_wall import wall_rows
from splash_rows import Plain, Splash, flash, flash_parts, splash, splash_rows

from rave_jax.kernels.attention.tuning import block_sizes

GROUPS = {"7B": 7, "3B": 8}
"""Model -> query heads that share a key head."""
SHARE = 0.6
"""Of tiles with a gate, in a batch of pictures and questions."""
TEXT_AIM, LINEAR_AIM = 1.05, 1.05
AIMS = {"v5e": 1.25, "v6e": 1.15}
"""Chip -> most that log_gate and tanh may cost, to the best plain kernel."""
OWN_PLAIN: dict[str, list[Blocks]] = {
    "forward": [(512, 512), (512, 1024), (1024, 512), (1024, 1024)],
    "backward": [(512, 512), (512, 1024)],
}
"""Blocks that our own kernels without a gate are tried with, as plain kernels."""


class Pass(NamedTuple):
    """One of our kernels on one chip: its costs by (gate, tiles), and what a step's guards cost."""

    costs: dict[tuple[Gate, Tiles], Cost]
    plain: Cost
    """Without a gate, with the blocks of OWN_PLAIN that are best for two heads."""
    guards: float
    """Cycles of a grid."""

    def share(self, gate: Gate, heads: int) -> float:
        """A batch with visual share SHARE, guards and all."""
        c0, c1 = self.costs["none", "gated"].at(heads), self.costs[gate, "gated"].at(heads)
        return (1 - SHARE) * c0 + SHARE * c1 + self.guards

    def least(self, heads: int) -> float:
        """Without a gate. What is best for two heads need not be for more, so the tuned blocks count too."""
        return min(self.plain.at(heads), self.costs["none", "gated"].at(heads))

    def text(self, heads: int) -> float:
        """A batch without a picture, in a call that has a gate."""
        return self.costs["log_gate", "plain"].at(heads) + self.guards


def ours(which: str, gate: Gate, tiles: Tiles, choices: Sequence[Blocks]) -> Kernel:
    """One of our kernels."""
    made = f"attention_programs:{which}_program"
    settings = {"gate": gate, "tiles": tiles}
    label = f"ours {which}, {gate}, {tiles}"
    return Kernel(label, made, f"attention_{which}", choices, settings, heads_in_grid=False)


def our_pass(chip: str, which: str, length: int, linear: Gate) -> Pass:
    """All that is to know of one of our kernels.

    Raises:
        RuntimeError: one has no estimate.
    """
    sizes = block_sizes(KINDS[chip])
    blocks = sizes.forward if which == "forward" else sizes.backward

    def found(gate: Gate, tiles: Tiles, choices: Sequence[Blocks] = (blocks,)) -> Cost:
        kernel = ours(which, gate, tiles, choices)
        best, _ = cost(chip, kernel, length, choices)
        if best is None:
            raise RuntimeError(
                f"{kernel.label} with blocks {choices} has no estimate for {chip} at T {length}; a line above says why"
            )
        return best

    gates: tuple[Gate, ...] = ("none", "log_gate", "tanh", linear)
    kinds: list[tuple[Gate, Tiles]] = [*((gate, "gated") for gate in gates), ("log_gate", "plain")]
    costs = {kind: found(*kind) for kind in kinds}
    # What guards cost has nothing to do with the heads.
    tested, known = (
        ranked(chip, ours(which, "log_gate", tiles, [blocks]), 2, length, [blocks])[0].cycles
        for tiles in ("by facts", "all")
    )
    return Pass(costs, found("none", "gated", OWN_PLAIN[which]), max(0.0, tested - known))


def our_rows(
    chip: str, length: int, passes: dict[str, Pass], plains: dict[str, list[Plain]]
) -> Iterator[dict[str, Any]]:
    """Cycles, and ratios to the best plain kernel.

    Args:
        chip: compiled for.
        length: T.
        passes: forward and backward.
        plains: model -> jax's plain kernels; none where they are not counted.
    """
    for (which, found), (model, heads) in itertools.product(passes.items(), GROUPS.items()):
        where = f"{model} group ({heads} heads), T {length}"
        for (gate, tiles), made in found.costs.items():
            more = described(made)
            yield row(f"ours {which}, {gate}, tiles {tiles}, {where}", chip, round(made.at(heads)), "cycles", more)
        more = {"of_c0": round(found.guards / found.costs["none", "gated"].at(heads), 4)}
        yield row(f"ours {which}, the guards' tests, {where}", chip, round(found.guards), "cycles", more)
    forward, backward = passes["forward"], passes["backward"]
    for model, heads in GROUPS.items():
        where = f"{model} group ({heads} heads), T {length}"
        own = forward.least(heads)
        plain = [*plains.get(model, ()), Plain("ours without a gate", own, own + backward.least(heads))]
        gates = [gate for gate, tiles in forward.costs if gate != "none" and tiles == "gated"]
        for gate in gates:
            is_linear = gate in ("linear", "folded")
            aim = (LINEAR_AIM if chip == "v6e" else None) if is_linear else AIMS.get(chip)
            costs = forward.share(gate, heads), backward.share(gate, heads)
            yield from to_plain(f"{gate}, visual share {SHARE}", where, chip, costs, plain, aim)
        costs = forward.text(heads), backward.text(heads)
        yield from to_plain("text only", where, chip, costs, plain, TEXT_AIM)


def to_plain(
    name: str, where: str, chip: str, costs: tuple[float, float], plain: list[Plain], aim: float | None
) -> Iterator[dict[str, Any]]:
    """Ratios to the best plain kernel, and beside them to the best of jax's (all of `plain` but the last)."""
    totals = {"forward": costs[0], "forward and backward": sum(costs)}
    for of, total in totals.items():
        cycles = [(p.forward if of == "forward" else p.both, p.name) for p in plain]
        least, against = min(cycles)
        more: dict[str, Any] = {"against": against}
        if len(cycles) > 1:
            more["to_jaxs_best"] = round(total / min(cycles[:-1])[0], 3)
        yield ratio(f"{name}, {of}, {where}", chip, total / least, aim, more)


def chip_rows(chip: str, lengths: Sequence[int], ours_alone: bool) -> Iterator[dict[str, Any]]:
    """All rows of a chip that are of cycles and of what a grid copies."""
    jaxs, linear = Splash(chip), "folded" if block_sizes(KINDS[chip]).fold_linear else "linear"
    for length in lengths:
        yield from bytes_rows(chip, length)
        passes = {which: our_pass(chip, which, length, linear) for which in OWN_PLAIN}
        if ours_alone:
            yield from our_rows(chip, length, passes, {})
            continue
        costs = jaxs.costs(length)
        plains = {model: [splash(costs, heads)] for model, heads in GROUPS.items()}
        parts = flash_parts(chip, length) if length == lengths[0] else {}
        for model, heads in GROUPS.items():
            where = f"{model} group ({heads} heads), T {length}"
            yield from splash_rows(chip, where, costs, heads)
            plains[model] += [flash(parts, heads)] if parts else []
            for plain in plains[model]:
                more = {"forward": round(plain.forward)}
                yield row(f"{plain.name}, forward and backward, {where}", chip, round(plain.both), "cycles", more)
        yield from our_rows(chip, length, passes, plains)


def main() -> None:
    """Estimate, time and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="TPU attention kernels, by static cycles.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--chips", nargs="*", default=["v5e", "v6e"], help="chips to compile for")
    parser.add_argument("--memory", nargs="*", default=list(KINDS), help="chips to ask for the memory of long rows")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192], help="T, queries and keys")
    parser.add_argument("--rounds", type=int, default=41, help="of the timing on this machine")
    parser.add_argument("--ours", action="store_true", help="count no kernels of jax: less than half the time")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    parts = [wall_rows(args.rounds), *map(memory_rows, args.memory)]
    for made in itertools.chain(*parts, *(chip_rows(chip, args.lengths, args.ours) for chip in args.chips)):
        rows.append(made)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
