"""Plans of the released configs: HBM, MFU bounds and what RAVE adds, compiled for TPUs that are not there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from estimates import row

from rave_jax.command_line import config_file
from rave_jax.config import load_file
from rave_jax.plan.chips import parse_topology
from rave_jax.plan.compile import Wanted, compile_step
from rave_jax.plan.models import model_of
from rave_jax.plan.report import Plan

PLANS = (
    ("qwen2_5_vl_7b_rave_sft", "v5e:16x16", 1),
    ("qwen2_5_vl_7b_rave_sft", "v6e:8x8", 1),
    ("qwen2_5_vl_7b_rave_sft", "v5e:16x16", 2),
    ("qwen3_vl_8b_rave_sft", "v5e:16x16", 1),
    ("qwen3_vl_8b_rave_sft", "v6e:8x8", 1),
    ("qwen2_5_vl_7b_gaze_video_sft", "v5p:4x4x4", 1),
    ("qwen2_5_vl_3b_rave_sft", "v5e:4x4", 1),
    ("qwen3_vl_30b_a3b_rave_sft", "v5p:4x4x8", 1),
    ("qwen3_vl_32b_rave_sft", "v5p:4x4x8", 1),
    ("qwen2_5_vl_72b_rave_sft", "v5p:8x8x8", 1),
)
MOST_HBM, LEAST_MFU, MOST_ADDED = 0.85, 0.6, 0.03


def rows_of(name: str, topology_name: str, slices: int) -> Iterator[dict[str, Any]]:
    """HBM of a config, its bounds, and the mechanisms' part of the FLOPs."""
    config, topology = load_file(config_file(name)), parse_topology(topology_name, slices)
    vlm, source = model_of(config.init)
    plan = Plan(name, source, topology, compile_step(Wanted(config, vlm, topology)))
    step, found, where = plan.step, plan.bounds, str(topology)
    more = {"GiB": round(step.hbm.peak / 2**30, 2), "seconds_to_compile": round(step.seconds)}
    yield row(f"{name}: HBM peak", where, plan.share, "of a chip", more, f"<= {MOST_HBM}", plan.share <= MOST_HBM)
    if found is None:
        return
    parts: dict[str, object] = {part: round(seconds, 4) for part, seconds in found.parts.items()}
    parts |= {"largest": found.largest, "synchronous": round(found.synchronous, 4)}
    aimed = name == "qwen2_5_vl_7b_rave_sft" and topology_name == "v5e:16x16" and slices == 1
    for title, value in (("everything overlapped", found.mfu), ("synchronous collectives exposed", found.mfu_exposed)):
        aim, holds = (f">= {LEAST_MFU}", value >= LEAST_MFU) if aimed else ("", True)
        yield row(f"{name}: MFU bound, {title}", where, value, "of peak", parts, aim, holds)
    added = step.flops.mechanisms / step.flops.model
    yield row(f"{name}: FLOPs of mechanisms", where, added, "of model", None, f"<= {MOST_ADDED}", added <= MOST_ADDED)


def main() -> None:
    """Plan each config, or those whose name or topology contains `--only`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--only", default="", help="part of `CONFIG TOPOLOGY SLICES`")
    arguments = parser.parse_args()
    rows = []
    for plan in PLANS:
        if arguments.only in " ".join(map(str, plan)):
            rows += rows_of(*plan)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
