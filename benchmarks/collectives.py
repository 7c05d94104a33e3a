"""Collectives of the train step of Qwen2.5-VL-7B with RAVE on a mesh of TPUs, read from the compiled module.

The step is that of configs/qwen2_5_vl_7b_rave_sft.py at the model's true widths, with few layers: layers are one loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any
from unittest import mock

# libtpu reads them when it is loaded. It is to ask no metadata server, and to share the machine with others like it.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
from jax.experimental import topologies

from rave_jax import config as configs
from rave_jax.data.collate import BatchShape, empty_batch
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import batch_axis, batch_shardings
from rave_jax.parallel.sharding import use_mesh
from rave_jax.plan.collectives import read_collectives, traffic
from rave_jax.training.session import make_session

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "qwen2_5_vl_7b_rave_sft.py"
GIB = 2**30


def compiled_step(
    topology: str, mesh_config: MeshConfig, layers: int, patches: int, rows: int
) -> tuple[str, int, dict]:
    """Text of the module, bytes of HBM at its peak, and the mesh's axes."""
    config = configs.load_file(CONFIG)
    vlm = qwen2_5_vl_7b()
    vlm = dataclasses.replace(vlm, text=dataclasses.replace(vlm.text, num_layers=layers))
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(mesh_config, devices)
    # These devices compute nothing: constants of the trace must not be put on them.
    of_shapes = mock.patch.object(jax, "set_mesh", lambda mesh: jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
    with of_shapes, use_mesh(mesh):
        model = jax.eval_shape(lambda key: Vlm(vlm, config.model, key=key), jax.random.key(0))
        session = make_session(
            model, config.optimizer, mesh, steps=config.steps, rows=rows, loss_chunk=config.loss_chunk
        )
        row = empty_batch(BatchShape(1, config.data.tokens, patches), vlm.patch_sizes.numbers, vlm.patch_sizes.mixed)

        def placed(axis: int, x: jax.Array, place: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
            shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=place)

        batch = jax.tree.map(placed, batch_axis(), row, batch_shardings(mesh, rows))
        step: Any = session.step
        compiled = step.trace(session.state, batch).lower().compile()
    return compiled.as_text(), compiled.memory_analysis().peak_memory_in_bytes, dict(mesh.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--tensor", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--patches", type=int, default=0, help="patches of a row; 0 compiles no tower")
    parser.add_argument("--rows", type=int, default=2, help="rows on each shard of the batch")
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


if __name__ == "__main__":
    main()
