"""A config turned into programs and places: groups, optimizer, shardings and the compiled step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from rave_jax.checkpoint.store import abstract
from rave_jax.config import require
from rave_jax.models.vlm import Vlm
from rave_jax.observe.tables import GroupRow
from rave_jax.parallel.rows import batch_shardings, row_ways
from rave_jax.parallel.sharding import replicated
from rave_jax.training.config import TrainConfig
from rave_jax.training.optimizers import (
    UNUSED,
    OptimizerConfig,
    ParameterGroup,
    Schedule,
    assign_groups,
    learning_rate_schedule,
    make_optimizer,
)
from rave_jax.training.splits import check_splits
from rave_jax.training.state import ModelGraph, Params, TrainState, init_state, on_hosts, parameter_of, state_shardings
from rave_jax.training.step import Step, compile_step, make_step, moved_for_step
from rave_jax.training.whole import check_whole


@dataclass(frozen=True)
class Session:
    """What the loop runs. Nothing here holds a parameter's numbers."""

    mesh: Mesh
    config: OptimizerConfig
    graph: ModelGraph
    groups: Mapping[str, ParameterGroup]
    """Group of every parameter."""
    optimizer: optax.GradientTransformation
    schedule: Schedule
    state: TrainState
    """Abstract state with shardings: the target of a restore."""
    step: Step
    """Compiled at its first call, which donates the state it is given. Call and lower it inside `use_mesh(mesh)`."""

    def first_state(self, params: Params) -> TrainState:
        """State before the first step, from parameters that lie on the mesh."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state)

        def first(params: Params) -> TrainState:
            return init_state(params, self.groups, self.optimizer, self.config)

        return jax.jit(first, out_shardings=shardings, donate_argnums=0)(params)

    def model(self, state: TrainState) -> Any:
        """The module as evaluations take it, in the number types that it is computed with."""
        ema = self.config.ema
        averaged = state.ema if ema is not None and ema.evaluate else {}
        return self.graph.merge(self.graph.computed(state.trained | averaged | state.frozen))


def session_of(config: TrainConfig, model: Vlm, mesh: Mesh) -> Session:
    """The session of a run, of a mesh that can split its model and its rows.

    Args:
        config: of the run.
        model: abstract.
        mesh: where the run lives.

    Raises:
        ConfigError: what `make_session` raises, or the mesh does not fit the model or its rows.
    """
    check_splits(config, model, mesh)
    session = make_session(
        model,
        config.optimizer,
        mesh,
        steps=config.steps,
        rows=config.data.rows,
        loss_chunk=config.loss_chunk,
        z_loss=config.z_loss,
    )
    check_whole(session.graph.shapes, session.graph.axes, mesh, allow=config.mesh.allow_whole)
    return session


def make_session(
    model: nnx.Module,
    config: OptimizerConfig,
    mesh: Mesh,
    *,
    steps: int,
    rows: int,
    loss_chunk: int,
    z_loss: float = 0.0,
) -> Session:
    """
    Args:
        model: the module, or an abstract one from `jax.eval_shape`.
        config: optimizer and groups.
        mesh: where the run lives.
        steps: of the whole run.
        rows: of the global batch.
        loss_chunk: tokens of a row whose logits exist at one time.
        z_loss: coefficient of the z-loss.

    Raises:
        ConfigError: a group that matches nothing, everything frozen, or rows that mesh and accumulation do not divide.
    """
    ways = row_ways(mesh) * config.accumulation
    what = f"a multiple of {ways}: row shards of the mesh ({row_ways(mesh)}) times accumulation ({config.accumulation})"
    require(rows % ways == 0, "data rows", rows, what)
    graph = ModelGraph(model)
    groups = assign_groups(graph.names, config) | dict.fromkeys(graph.unused, UNUSED)
    trained = {name: group for name, group in groups.items() if not group.frozen}
    require(
        bool(trained),
        "optimizer.groups",
        [group.name for group in config.groups],
        "groups that leave something to train",
    )
    optimizer = make_optimizer(config, steps, trained, graph.axes)
    schedule = learning_rate_schedule(config, steps)
    shapes = jax.eval_shape(lambda: init_state(graph.empty(), groups, optimizer, config))
    shardings = state_shardings(shapes, graph.shardings(mesh), mesh)
    sizes = {"steps": steps, "accumulation": config.accumulation, "loss_chunk": loss_chunk}
    step = make_step(graph, groups, optimizer, schedule, **sizes, z_loss=z_loss, ema=config.ema)
    if config.offload:
        on_devices, shardings = shardings, on_hosts(shardings)
        step = moved_for_step(step, on_devices, shardings)
    compiled = compile_step(step, shardings, batch_shardings(mesh, rows), replicated(mesh))
    return Session(mesh, config, graph, groups, optimizer, schedule, abstract(shapes, shardings), compiled)


def group_rows(session: Session, config: OptimizerConfig) -> list[GroupRow]:
    """The parameter table: what trains, what does not, and what it costs."""
    optimizer_bytes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path((session.state.optimizer, session.state.ema))[0]:
        name = parameter_of(path, session.groups)
        if name is not None:
            optimizer_bytes[name] = optimizer_bytes.get(name, 0) + _bytes(leaf)
    rows: list[GroupRow] = []
    for group in dict.fromkeys(session.groups.values()):
        for adapters in (False, True):
            names = [n for n, g in session.groups.items() if g is group and (".adapter." in n) == adapters]
            if names:
                rows.append(
                    _group_row(session, config, group, names, optimizer_bytes, "LoRA" if adapters else "trained")
                )
    return rows


def _group_row(
    session: Session,
    config: OptimizerConfig,
    group: ParameterGroup,
    names: list[str],
    optimizer_bytes: Mapping[str, int],
    trained: str,
) -> GroupRow:
    phase = "" if group.freeze_after is None else f" until step {group.freeze_after}"
    placed = session.state.trained | session.state.frozen
    leaves = [placed[name] for name in names]
    decay = config.weight_decay if group.weight_decay is None else group.weight_decay
    return GroupRow(
        group=group.name,
        state="frozen" if group.frozen else trained + phase,
        tensors=len(names),
        parameters=sum(math.prod(leaf.shape) for leaf in leaves),
        bytes=sum(map(_bytes, leaves)),
        optimizer_bytes=sum(optimizer_bytes.get(name, 0) for name in names),
        learning_rate=0.0 if group.frozen else group.learning_rate * config.learning_rate,
        weight_decay=0.0 if group.frozen else decay,
        whole=sum(placed[name].sharding.is_fully_replicated for name in names) if session.mesh.size > 1 else 0,
    )


def _bytes(leaf: jax.ShapeDtypeStruct | jax.Array) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
