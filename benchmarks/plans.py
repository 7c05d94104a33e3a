"""Plans of the released configs: HBM, MFU bounds and what RAVE adds, compiled for TPUs that are not there.

`plans.json` beside this file keeps collectives and memory of each; `--check` holds a fresh compile against it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from estimates import row

from rave_jax.command_line import config_file
from rave_jax.config import load_file
from rave_jax.plan.chips import parse_topology
from rave_jax.plan.compile import Wanted, compile_all
from rave_jax.plan.models import model_of
from rave_jax.plan.record import differences, record_of
from rave_jax.plan.report import Plan

PLANS = (
    ("qwen2_5_vl_7b_rave_sft", "v5e:16x16", 1),
    ("qwen2_5_vl_7b_rave_sft", "v6e:8x8", 1),
    ("qwen2_5_vl_7b_rave_sft_slices", "v5e:16x16", 2),
    ("qwen3_vl_8b_rave_sft", "v5e:16x16", 1),
    ("qwen3_vl_8b_rave_sft", "v6e:8x8", 1),
    ("qwen2_5_vl_7b_gaze_video_sft", "v5p:4x4x4", 1),
    ("qwen2_5_vl_3b_rave_sft", "v5e:4x4", 1),
    ("qwen3_vl_30b_a3b_rave_sft", "v5p:4x4x8", 1),
    ("qwen3_vl_32b_rave_sft", "v5p:4x4x8", 1),
    ("qwen2_5_vl_72b_rave_sft", "v5p:8x8x8", 1),
)
AIMED = PLANS[0]
"""Whose MFU bound has an aim, and which is compiled without RAVE too."""
MOST_HBM, LEAST_MFU, MOST_ADDED = 0.85, 0.6, 0.03
KEPT = Path(__file__).with_name("plans.json")


def planned(name: str, topology_name: str, slices: int, compare: bool) -> Plan:
    """A config compiled for a topology, and with `compare` without its mechanisms beside it."""
    config, topology = load_file(config_file(name)), parse_topology(topology_name, slices)
    vlm, source = model_of(config.init)
    wanted = Wanted(config, vlm, topology)
    plain = [Wanted(config, vlm, topology, plain=True)] if compare else []
    return Plan(name, source, topology, *compile_all([wanted, *plain]))


def rows_of(plan: Plan, aimed: bool) -> Iterator[dict[str, Any]]:
    """HBM of a config, its bounds, and what the mechanisms add."""
    step, found, where, name = plan.step, plan.bounds, str(plan.topology), plan.config
    more = {"GiB": round(step.hbm.peak / 2**30, 2), "seconds_to_compile": round(step.seconds)}
    yield row(f"{name}: HBM peak", where, plan.share, "of a chip", more, f"<= {MOST_HBM}", plan.share <= MOST_HBM)
    if found is None:
        return
    parts: dict[str, object] = {part: round(seconds, 4) for part, seconds in found.parts.items()}
    parts |= {"largest": found.largest, "synchronous": round(found.synchronous, 4)}
    for title, value in (("everything overlapped", found.mfu), ("synchronous collectives exposed", found.mfu_exposed)):
        aim, holds = (f">= {LEAST_MFU}", value >= LEAST_MFU) if aimed else ("", True)
        yield row(f"{name}: MFU bound, {title}", where, value, "of peak", parts, aim, holds)
    added = step.flops.mechanisms / step.flops.model
    yield row(f"{name}: FLOPs of mechanisms", where, added, "of model", None, f"<= {MOST_ADDED}", added <= MOST_ADDED)
    for title, share in (plan.added or {}).items():
        label = f"{name}: mechanisms in the bound, {title}"
        yield row(label, where, share, "of the step without", None, f"<= {MOST_ADDED}", share <= MOST_ADDED)


def main() -> int:
    """Plan each config, or those whose name or topology contains `--only`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--only", default="", help="part of `CONFIG TOPOLOGY SLICES`")
    parser.add_argument("--check", action="store_true", help="hold each against plans.json; exit 1 where one differs")
    parser.add_argument("--keep", action="store_true", help="write each into plans.json")
    parser.add_argument("--compare-plain", action="store_true", help="compile each without its mechanisms too")
    arguments = parser.parse_args()
    rows, wrong = [], []
    for pair in PLANS:
        called = " ".join(map(str, pair))
        if arguments.only not in called:
            continue
        plan = planned(*pair, compare=arguments.compare_plain or pair == AIMED)
        rows += rows_of(plan, pair == AIMED)
        kept = json.loads(KEPT.read_text())
        if arguments.check:
            wrong += [f"{called}: {one}" for one in differences(kept[called], record_of(plan))]
        if arguments.keep:
            KEPT.write_text(json.dumps(kept | {called: record_of(plan)}, indent=1) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
