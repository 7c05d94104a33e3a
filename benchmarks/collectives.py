"""Collectives of the train step of Qwen2.5-VL-7B with RAVE on a mesh of TPUs, read from the compiler's module.

The step is that of configs/qwen2_5_vl_7b_rave_sft.py at the model's true widths, with few layers: layers are one loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rave_jax.command_line import config_file
from rave_jax.config import load_file
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.plan.chips import parse_topology
from rave_jax.plan.compile import Wanted, compile_step
from rave_jax.plan.depth import shortened

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--tensor", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--patches", type=int, default=0, help="patches of a row; 0 compiles no tower")
    parser.add_argument("--rows", type=int, default=2, help="rows on each shard of the batch")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    topology = parse_topology(args.topology)
    config = load_file(config_file("qwen2_5_vl_7b_rave_sft"))
    rows = args.rows * topology.devices // args.tensor
    data = dataclasses.replace(config.data, rows=rows, patches=args.patches, stages=())
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=-1, tensor=args.tensor), data=data)
    step = compile_step(Wanted(config, shortened(qwen2_5_vl_7b(), args.layers), topology))
    found = [one.traffic for one in step.moved]
    print(f"{topology}, {step.mesh}, {args.layers} layers: {step.hbm.peak / GIB:.2f} GiB of HBM")
    for one in found:
        how = "asynchronous" if one.asynchronous else "synchronous"
        print(f"{one.kind:>20} over {'+'.join(one.axes):<16} {how:<13} {one.times:5d} times {one.sent / GIB:7.3f} GiB")
    for how in (True, False):
        total = sum(one.sent for one in found if one.asynchronous == how)
        print(f"{'asynchronous' if how else 'synchronous'}: {total / GIB:.3f} GiB sent by each chip in a step")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()
