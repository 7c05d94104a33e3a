"""Which blocks our TPU kernels should have, by the compiler's static cycles: entries for kernels/attention/tuning.py.

Forward and backward kernel apart. Every choice of the list is compiled with the log gate in every tile, the best three
also without a gate; what counts is a batch with visual share 0.6. Then the linear gate, both ways. No chip is needed,
and so nothing here is a time. Three heads of the seven of a 7B model compile in a fraction of the time; that the winner
fits the chip is tried with eight.

    python benchmarks/tune_kernels.py [--json FILE] [--chips v5e v6e] [--heads 3] [--length 4096]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from attention_programs import Gate
from estimates import Blocks, Kernel, ranked, row

from rave_jax.tools.tpu import compile_cases

CHOICES: dict[str, list[Blocks]] = {
    "forward": [(256, 512), (512, 512), (256, 1024), (512, 1024), (1024, 512), (1024, 1024)],
    "backward": [(256, 256), (256, 512), (512, 256), (512, 512), (256, 1024), (512, 1024), (1024, 512)],
}
SHARE = 0.6
"""Of tiles with a gate."""
FINALISTS = 3
MOST_HEADS = 8
MOST_KEYS = 32768
"""What must fit: `BlockSizes.key_bytes`."""


def kernel(which: str, gate: Gate) -> Kernel:
    """One of ours."""
    return Kernel(
        f"{which} {gate}",
        f"attention_programs:{which}_program",
        f"attention_{which}",
        CHOICES[which],
        {"gate": gate},
        heads_in_grid=False,
    )


def tuned(chip: str, which: str, heads: int, length: int) -> tuple[list[dict[str, Any]], Blocks | None]:
    """The ranking of one kernel's blocks, and the first that fits; None where none does."""
    gated = {
        best.blocks: best.cycles for best in ranked(chip, kernel(which, "log_gate"), heads, length, CHOICES[which])
    }
    finalists = list(gated)[:FINALISTS]
    plain = {best.blocks: best.cycles for best in ranked(chip, kernel(which, "none"), heads, length, finalists)}
    total = {blocks: round(SHARE * gated[blocks] + (1 - SHARE) * plain[blocks]) for blocks in plain}
    rows = []
    for blocks in sorted(total, key=total.__getitem__):
        more = {"blocks": blocks, "log_gate": gated[blocks], "none": plain[blocks]}
        rows.append(row(f"{which} {blocks}, share {SHARE} gated", chip, total[blocks], "cycles", more))
    for blocks in gated:
        if blocks not in total:
            rows.append(row(f"{which} {blocks}, log_gate alone", chip, gated[blocks], "cycles", {"blocks": blocks}))
    for blocks in CHOICES[which]:
        if blocks not in gated:
            print(f"{which} {blocks}, {chip}: not compiled")
    winner = next((blocks for blocks in sorted(total, key=total.__getitem__) if fits(chip, which, blocks)), None)
    return rows, winner


def fits(chip: str, which: str, blocks: Blocks) -> bool:
    """Does the kernel compile with as many heads as any model's kv head has, and as many keys as it keeps?"""
    case = kernel(which, "log_gate").case(MOST_HEADS, MOST_KEYS, blocks)
    error = compile_cases(chip, [case])[case.name].error
    if error:
        print(f"{which} {blocks}, {chip}, {MOST_HEADS} heads: not compiled: {error.splitlines()[0]}")
    return error is None


def linear_rows(chip: str, winners: dict[str, Blocks], heads: int, length: int) -> tuple[list[dict[str, Any]], bool]:
    """The linear gate as a product of its own and folded into that of the scores, and whether folding pays."""
    rows, total = [], {}
    for gate in ("linear", "folded"):
        for which, blocks in winners.items():
            if found := ranked(chip, kernel(which, gate), heads, length, [blocks]):
                rows.append(row(f"{which} {gate} {blocks}", chip, found[0].cycles, "cycles", {"blocks": blocks}))
                total.setdefault(gate, []).append(found[0].cycles)
            else:
                print(f"{which} {gate} {blocks}, {chip}: not compiled")
    both = {gate: sum(parts) for gate, parts in total.items() if len(parts) == len(winners)}
    return rows, min(both, key=both.__getitem__, default="linear") == "folded"


def main() -> None:
    """Try, print the ranking and the entries; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="Blocks for our TPU attention kernels, by static cycles.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"], help="chips to compile for")
    parser.add_argument("--heads", type=int, default=3, help="query heads of the kv group")
    parser.add_argument("--length", type=int, default=4096, help="T, queries and keys")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for chip in args.chips:
        winners = {}
        for which in CHOICES:
            found, winner = tuned(chip, which, args.heads, args.length)
            rows += found
            if winner is not None:
                winners[which] = winner
        if len(winners) < len(CHOICES):
            print(f"{chip}: no blocks for {' and '.join(sorted(set(CHOICES) - set(winners)))}", flush=True)
            continue
        found, fold = linear_rows(chip, winners, args.heads, args.length)
        rows += found
        print(f"{chip}: BlockSizes({winners['forward']}, {winners['backward']}, fold_linear={fold})", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
