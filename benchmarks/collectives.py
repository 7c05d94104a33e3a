"""Collectives of the train step of Qwen2.5-VL-7B with RAVE on a mesh of TPUs, read from the compiled module.

The step is that of configs/qwen2_5_vl_7b_rave_sft.py at the model's true widths, with few layers: layers are one loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

from rave_jax.plan.libtpu import environment

os.environ.update(environment())  # libtpu reads it when it is loaded

from jax.experimental import topologies

from rave_jax import config as configs
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.plan.collectives import read_collectives, traffic
from rave_jax.plan.program import train_program

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "qwen2_5_vl_7b_rave_sft.py"
GIB = 2**30


def compiled_step(
    topology: str, mesh_config: MeshConfig, layers: int, patches: int, rows: int
) -> tuple[str, int, dict]:
    """Text of the module, bytes of HBM at its peak, and the mesh's axes."""
    config = configs.load_file(CONFIG)
    config = dataclasses.replace(
        config, mesh=mesh_config, data=dataclasses.replace(config.data, rows=rows, patches=patches, stages=())
    )
    vlm = qwen2_5_vl_7b()
    vlm = dataclasses.replace(vlm, text=dataclasses.replace(vlm.text, num_layers=layers))
    mesh = make_mesh(mesh_config, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    compiled = train_program(config, vlm, mesh).lowered.compile()
    return compiled.as_text(), compiled.memory_analysis().peak_memory_in_bytes, dict(mesh.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--tensor", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--patches", type=int, default=0, help="patches of a row; 0 compiles no tower")
    parser.add_argument("--rows", type=int, default=2, help="rows on each shard of the batch")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    chips = len(topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices)
    rows = args.rows * chips // args.tensor
    mesh = MeshConfig(fsdp=-1, tensor=args.tensor)
    text, peak, axes = compiled_step(args.topology, mesh, args.layers, args.patches, rows)
    found = traffic(read_collectives(text, axes))
    print(f"{args.topology}, {axes}, {args.layers} layers: peak {peak / GIB:.2f} GiB of HBM")
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
