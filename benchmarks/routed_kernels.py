"""The kernels of routed attention beside the dense ones, without a TPU: work items times static cycles of an item.

Rows are those of text queries over visual keys: a row of T tokens is half a picture, then text, and each text query
chooses a quarter of the regions, by itself and independently for each. So a list has Binomial(queries, share of visits)
entries, in items that are filled up; a visit's cycles are the difference of two programs that differ in nothing but
their number. What a super-block costs before its first item is in the figures, what XLA makes around the kernels (the
choice, the lists, the tilings) is not. The dense kernel visits the same pairs all, not masked, with its tuned blocks.
tokamax's dynamic splash skips a tile of keys that no query of the tile needs: under independent choices 0.75^queries of
them. Its tile is counted as jax's splash, from which it comes.

    python benchmarks/routed_kernels.py [--json FILE] [--chips v5e v6e] [--heads 8 7]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from estimates import cost, ratio, row
from kernel_bytes import KINDS
from routed_programs import terms_of
from splash_rows import DKV, DQ, FORWARD

from rave_jax.kernels.attention.tuning import block_sizes
from rave_jax.kernels.routed.pallas_tpu.lists import SHARED, WHOLE
from rave_jax.kernels.routed.pallas_tpu.sizes import item_sizes, make_call, tiling_of
from rave_jax.kernels.routed.pallas_tpu.walk import Call
from rave_jax.tools.tpu import Case, compile_cases

LENGTH, VISUAL, SHARE = 32768, 0.5, 0.25
REGIONS = (128, 144, 256, 36)
APART = 128
"""Keys of a region where each head chooses for itself, and where there is a gate."""
AIMS, WHOLE_AIM = {36: 1.0}, 1.15
AIM = 0.5
"""Of regions that have no aim of their own."""
ROWS = 128
"""Of a unit: so many rows of queries by as many keys."""
FEW, MORE = 1, 3
"""Visits of many queries of a tile in the two programs."""
SPLASH_BLOCKS = {FORWARD: (1024, 1024, 512), DQ: (1024, 1024), DKV: (1024, 1024, 512)}
"""Of T 4096; see BENCHMARKS.md."""


def expected_visits(call: Call, share: float) -> tuple[float, float]:
    """(visits of many queries, visits of an item) of a list of Binomial(queries, share) entries, on the average."""
    n, long, single = call.queries, 0.0, 0.0
    for entries in range(n + 1):
        log = math.lgamma(n + 1) - math.lgamma(entries + 1) - math.lgamma(n - entries + 1)
        chance = math.exp(log + entries * math.log(share) + (n - entries) * math.log1p(-share)) if share < 1 else 0.0
        many, few = call.runs(-(-entries // call.item))
        long, single = long + chance * many, single + chance * max(few, 0)
    return long, single


def visit_cycles(chip: str, which: str, call: Call, kind: int) -> tuple[float, float, float]:
    """Cycles of a visit of many queries, of one of an item, and of a super-block without its visits."""
    several = call.together // call.item
    given = {
        "which": which,
        "lanes": call.tiling.lanes,
        "queries": call.queries,
        "item": call.item,
        "together": call.together,
        "chunk": call.chunks[0 if which == "forward" else 1],
        "kind": kind,
        "heads": call.G,
        "heads_apart": call.choices > 1,
        "gate": bool(call.terms),
        "shared": call.tiling.sharing if kind and call.tiling.rest else 1,
    }
    numbers = {"item": (1, 2), "many": (FEW * several, MORE * several)}
    cases = [Case(str(n), "routed_programs:program", {**given, "items": n}) for pair in numbers.values() for n in pair]
    compiled = compile_cases(chip, cases, cycles=True)
    one, two, few, more = (compiled[case.name].kernel_cycles(f"routed_{which}") for case in cases)
    many = (more - few) / (MORE - FEW) / 2
    return many, (two - one) / 2, few - 2 * FEW * many


def routed_pass(chip: str, which: str, call: Call) -> float:
    """Cycles of all text queries of a kv group."""
    tiling, text = call.tiling, LENGTH - int(LENGTH * VISUAL)

    def tiles(count: int, share: float, kind: int) -> tuple[float, float]:
        many, item, start = visit_cycles(chip, which, call, kind)
        long, single = expected_visits(call, share)
        return count * (long * many + single * item), start

    def chosen(regions: int) -> float:
        """Share of the queries of which any choice is any of so many regions."""
        return 1 - (1 - SHARE) ** (regions * call.choices)

    apart = call.choices > 1
    cycles, start = 0.0, 0.0
    if tiling.full:
        cycles, start = tiles(tiling.full * tiling.regions, chosen(1), SHARED if apart else WHOLE)
    if tiling.rest:
        shared, start = tiles(tiling.tiles - tiling.full * tiling.regions, chosen(tiling.sharing), SHARED)
        cycles += shared
    return text / call.queries * (cycles + start)


def dense_unit(chip: str, which: str, heads: int) -> float:
    """Cycles of a unit in our dense kernel, no tile masked."""
    blocks = block_sizes(KINDS[chip])
    length = 2048
    given = {"blocks": blocks.forward if which == "forward" else blocks.backward, "gate": "none", "tiles": "all"}
    cases = [
        Case(str(n), f"attention_programs:{which}_program", {**given, "heads": n, "length": length}) for n in (2, 3)
    ]
    found = compile_cases(chip, cases, cycles=True)
    two, three = (found[case.name].kernel_cycles(f"attention_{which}") for case in cases)
    return (two + (heads - 2) * (three - two)) / heads / (length // ROWS) ** 2


def splash_unit(chip: str, heads: int) -> float:
    """Cycles of a unit in the three kernels of splash attention, of the tiles that a causal grid visits."""
    total = 0.0
    for kernel, blocks in SPLASH_BLOCKS.items():
        best, _ = cost(chip, kernel, 4096, [blocks])
        if best is None:
            return math.nan
        tiles = sum(range(1, 4096 // blocks[0] + 1)) * (blocks[0] // ROWS) * (blocks[1] // ROWS)
        total += best.at(heads) / heads / tiles
    return total


def chip_rows(chip: str, heads: int, splash: bool) -> Iterator[dict[str, Any]]:
    """All rows of a chip."""
    visual = int(LENGTH * VISUAL)
    text = LENGTH - visual
    units = text * heads / ROWS * visual / ROWS
    dense = {which: dense_unit(chip, which, heads) for which in ("forward", "backward")}
    where = f"{heads} heads, T {LENGTH}, half of it visual, K {SHARE:.0%}"
    for which, found in dense.items():
        yield row(f"dense {which}, a unit of {ROWS} x {ROWS}, {heads} heads", chip, round(found, 1), "cycles")
    peer = math.nan
    if splash:
        queries = SPLASH_BLOCKS[FORWARD][0]
        peer = splash_unit(chip, heads) * (1 - (1 - SHARE) ** queries) * units
        yield row(f"dynamic splash, forward and backward, {where}", chip, round(peer), "cycles")
    for most_keys in REGIONS:
        call = call_of(chip, heads, most_keys)
        lists = expected_visits(call, SHARE)
        taken = lists[0] * call.together + lists[1] * call.item
        entries = {
            "lanes": call.tiling.lanes,
            "queries": call.queries,
            "fill of lanes": round(call.tiling.fill, 3),
            "fill of items": round(SHARE * call.queries / taken, 3),
        }
        try:
            passes = {which: routed_pass(chip, which, call) for which in dense}
        except ValueError as error:  # the compiler's estimate may die where the compiler does not
            print(f"no estimate for regions of {most_keys}, {chip}: {str(error)[:200]}", flush=True)
            continue
        for which, cycles in passes.items():
            yield ratio(
                f"routed {which} to dense, regions of {most_keys}, {where}", chip, cycles / (dense[which] * units), None
            )
        both = sum(passes.values()) / (sum(dense.values()) * units)
        name = f"routed to dense, forward and backward, regions of {most_keys}, {where}"
        yield ratio(name, chip, both, AIMS.get(most_keys, AIM), entries)
        if splash:
            yield ratio(
                f"routed to dynamic splash, regions of {most_keys}, {where}", chip, sum(passes.values()) / peer, 1.0
            )
        # Text over visual keys is 2 f (1 - f) of all pairs; the floor takes a quarter of that.
        mixed = 2 * VISUAL * (1 - VISUAL)
        floor = 1 - (1 - SHARE) * mixed
        whole = 1 - mixed + mixed * both
        name = f"whole attention to its floor of {floor:.3f}, regions of {most_keys}, {where}"
        yield ratio(name, chip, whole / floor, WHOLE_AIM, {"to dense": round(whole, 3)})
    call = call_of(chip, heads, APART, gate=True)
    both = sum(routed_pass(chip, which, call) for which in dense) / (sum(dense.values()) * units)
    name = f"routed with RAVE's log gate to dense without one, regions of {APART}, {where}"
    yield ratio(name, chip, both, None, {"queries": call.queries})
    # With a choice of each head: what any of them chose, or all alike.
    call = call_of(chip, heads, APART, choices=heads)
    for which in dense:
        many = visit_cycles(chip, which, call, SHARED)[0] / (call.together / ROWS * heads) / dense[which]
        name = f"a visit with masks for each head to dense, {which}, regions of {APART}, {heads} heads"
        yield ratio(name, chip, many, None)
    both = sum(routed_pass(chip, which, call) for which in dense) / (sum(dense.values()) * units)
    name = f"a choice for each query head to dense, all independent, regions of {APART}, {where}"
    yield ratio(name, chip, both, None, {"visited": round(1 - (1 - SHARE) ** heads, 3)})


def call_of(chip: str, heads: int, most_keys: int, choices: int = 1, *, gate: bool = False) -> Call:
    """The kernels' call for regions of so many keys, with RAVE's log gate if `gate`."""
    visual = int(LENGTH * VISUAL)
    q, k = (jnp.empty((1, LENGTH, n, 128), jnp.bfloat16) for n in (heads, 1))
    sizes = item_sizes(KINDS[chip])
    tiling = tiling_of(visual // most_keys, most_keys, sizes)
    call = make_call(q, k, tiling, sizes, 1.0, interpret=False, choices=choices, terms=terms_of(gate))
    assert call is not None
    return call


def main() -> None:
    """Estimate and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chips", nargs="*", default=["v5e", "v6e"])
    parser.add_argument("--heads", nargs="*", type=int, default=[8, 7])
    parser.add_argument("--no-splash", action="store_true")
    args = parser.parse_args()
    rows = [
        found for chip in args.chips for heads in args.heads for found in chip_rows(chip, heads, not args.no_splash)
    ]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
