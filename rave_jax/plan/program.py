"""The train step of a config over devices that need not exist: the training's own session, from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from rave_jax.batch import Batch
from rave_jax.checkpoint.target import abstract_model
from rave_jax.data.collate import BatchShape, empty_batch, round_up
from rave_jax.families.config import VlmConfig
from rave_jax.parallel.rows import batch_axis, batch_shardings
from rave_jax.parallel.sharding import use_mesh
from rave_jax.training.config import TrainConfig
from rave_jax.training.session import Session, session_of


@dataclasses.dataclass(frozen=True)
class Program:
    """A step that can be compiled.

    Args:
        session: of the run.
        batch: shapes of the batch, with shardings.
        mesh: without devices: those of a topology compute nothing, so that constants of the trace must not be put on
            them.
    """

    session: Session
    batch: Batch
    mesh: Any

    @functools.cached_property
    def lowered(self) -> Any:
        """The step, traced and lowered for TPUs at the first call."""
        step: Any = self.session.step  # under jit
        with use_mesh(self.mesh):
            return step.trace(self.session.state, self.batch).lower(lowering_platforms=("tpu",))


def largest_row(config: TrainConfig) -> tuple[int, int]:
    """Most tokens and patches of a row, over all stages."""
    data = config.data
    tokens = [data.tokens if stage.tokens is None else stage.tokens for stage in data.stages]
    return max(tokens), max(data.patches if stage.patches is None else stage.patches for stage in data.stages)


def abstract_batch(config: TrainConfig, vlm: VlmConfig) -> Batch:
    """Shapes of the global batch with the largest rows; only one row of it is made."""
    tokens, patches = largest_row(config)
    sizes = vlm.patch_sizes
    row = empty_batch(BatchShape(1, tokens, round_up(patches, sizes.window)), sizes.numbers, sizes.mixed)

    def widen(axis: int, x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*x.shape[:axis], config.data.rows, *x.shape[axis + 1 :]), x.dtype)

    return jax.tree.map(widen, batch_axis(), row)


def train_program(config: TrainConfig, vlm: VlmConfig, mesh: Any) -> Program:
    """The step of a run with these shapes.

    Args:
        config: of the run.
        vlm: its model.
        mesh: over the devices of a topology, or abstract.

    Raises:
        ConfigError: what `session_of` raises.
    """
    places = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    with use_mesh(places):
        session = session_of(config, abstract_model(vlm, config.model), mesh)
        batch = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract_batch(config, vlm),
            batch_shardings(mesh, config.data.rows),
        )
    return Program(session, batch, places)
