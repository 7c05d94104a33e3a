"""Compiles a small text model's step for chips that libtpu describes, and prints its collectives as JSON.

Needs no TPU.
"""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import jax
from jax.experimental import topologies

from rave_jax.models.config import ModelOptions
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import batch_axis, batch_shardings
from rave_jax.parallel.sharding import use_mesh
from rave_jax.plan.collectives import read_collectives
from rave_jax.training.optimizers import OptimizerConfig
from tests.training import small
from tests.training.small import TEXT, random_batch, session_of

SHAPE = {"vocab_size": 1024, "hidden_size": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
MODEL = dataclasses.replace(TEXT, text=dataclasses.replace(TEXT.text, **SHAPE, mlp_size=512))
OPTIONS = ModelOptions(compute_dtype="bfloat16", remat="full", sequence_parallel=True)
CHIPS = {"v5e:4x4": MeshConfig(fsdp=4, tensor=4), "v6e:4x4": MeshConfig(fsdp=16)}
ROWS, TOKENS = 32, 64


def main() -> None:
    found = {}
    for topology, config in CHIPS.items():
        mesh = make_mesh(config, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
        # These devices compute nothing: constants of the trace must not be put on them.
        of_shapes = mock.patch.object(jax, "set_mesh", lambda mesh: jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        of_tokens = mock.patch.object(small, "LENGTH", TOKENS)
        with of_shapes, of_tokens, use_mesh(mesh):
            session = session_of(OptimizerConfig(), mesh, rows=ROWS, config=MODEL, options=OPTIONS)

            def place(axis: int, x: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

            batch = jax.tree.map(place, batch_axis(), random_batch(0, ROWS, 0), batch_shardings(mesh, ROWS))
            compiled = session.step.trace(session.state, batch).lower().compile()
        read = read_collectives(compiled.as_text(), dict(mesh.shape))
        rows = [(one.kind, list(one.axes), one.size, one.times, one.asynchronous) for one in read]
        found[topology] = {"collectives": rows, "parameters": sum(x.size for x in session.state.trained.values())}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
