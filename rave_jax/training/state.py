"""What a step reads and returns: parameters by name, trained apart from frozen, and optimizer state.

The model is an nnx module only while it computes. Between steps its numbers live in flat dicts by canonical
path, which parameter groups, optimizer state and checkpoints share.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rave_jax.checkpoint.store import abstract
from rave_jax.models.parameters import is_unused, named_parameters, param_axes
from rave_jax.parallel.sharding import named_sharding, replicated
from rave_jax.training.optimizers import UNUSED, OptimizerConfig, ParameterGroup, assign_groups
from rave_jax.typing import Array, Int

Params = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that training changes, and the parameters that it does not.

    Fields:
        step: optimizer steps done.
        bad_step: the step whose loss or gradient was not finite, or -1; from then on the state stands still.
        trained: parameters with gradients, by canonical path; with master copies in float32.
        frozen: parameters without.
        optimizer: optax state of the trained ones.
        ema: moving average of the trained ones; empty without one.
    """

    step: Int[Array, ""]
    bad_step: Int[Array, ""]
    trained: Params
    frozen: Params
    optimizer: optax.OptState
    ema: Params


class ModelGraph[M: nnx.Module]:
    """A model without its numbers: takes a module apart into a dict by canonical path and puts it together."""

    def __init__(self, model: M):
        """
        Args:
            model: a module, or an abstract one from `jax.eval_shape`.
        """
        named = named_parameters(model)
        self.axes = {name: param_axes(param) for name, param in named.items()}
        self.names = tuple(named)
        self.unused = frozenset(name for name, param in named.items() if is_unused(param))
        """Parameters that nothing is computed with."""
        leaves, self._treedef = jax.tree.flatten(model)
        assert len(leaves) == len(self.names), "a model holds parameters and nothing else"
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        self.shapes = dict(zip(self.names, shapes, strict=True))

    def empty(self) -> Params:
        """Zeros in the place of all parameters."""
        return {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in self.shapes.items()}

    def split(self, model: M) -> Params:
        """The numbers of a module of this shape, by name."""
        return dict(zip(self.names, jax.tree.leaves(model), strict=True))

    def merge(self, values: Mapping[str, jax.Array]) -> M:
        """The module with these numbers."""
        return jax.tree.unflatten(self._treedef, [values[name] for name in self.names])

    def computed(self, values: Mapping[str, jax.Array]) -> Params:
        """The parameters in the number types that the model computes with."""
        return {name: x.astype(self.shapes[name].dtype) for name, x in values.items()}

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """Where each parameter goes."""
        return {name: named_sharding(self.axes[name], self.shapes[name].shape, mesh) for name in self.names}


def init_state(
    params: Params,
    groups: Mapping[str, ParameterGroup],
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
) -> TrainState:
    """State before the first step. Traceable."""
    trained = {name: value for name, value in params.items() if not groups[name].frozen}
    frozen = {name: value for name, value in params.items() if groups[name].frozen}
    if config.master_copies:
        trained = {name: value.astype(jnp.float32) for name, value in trained.items()}
    ema = {} if config.ema is None else config.ema.first(trained)
    step, bad_step = jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32)
    return TrainState(step, bad_step, trained, frozen, optimizer.init(trained), ema)


def state_shardings(abstract: TrainState, params: Mapping[str, NamedSharding], mesh: Mesh) -> TrainState:
    """Where each array of a state goes: optimizer state lies with its parameter, and counters are replicated."""
    shapes = {name: x.shape for name, x in (abstract.trained | abstract.frozen).items()}

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = parameter_of(path, params)
        return replicated(mesh) if name is None else placed_with(leaf.shape, shapes[name], params[name])

    return jax.tree_util.tree_map_with_path(place, abstract)


def parameter_of(path: tuple[Any, ...], names: Container[str]) -> str | None:
    """The parameter that an array of a state belongs to. A state repeats the dict of parameters, so a key names one."""
    keys = (str(getattr(key, "key", "")) for key in reversed(path))
    return next((key for key in keys if key in names), None)


def placed_with(shape: tuple[int, ...], whole: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """Where an array goes that belongs to a parameter: numbers of its shape, of blocks along an axis, or without one.

    Args:
        shape: of the array.
        whole: of the parameter.
        sharding: of the parameter.
    """
    entries = [*sharding.spec, *[None] * (len(whole) - len(sharding.spec))]
    if len(shape) == len(whole) - 1:
        gone = next((n for n in range(len(whole)) if (*whole[:n], *whole[n + 1 :]) == shape), None)
        entries = [] if gone is None else [*entries[:gone], *entries[gone + 1 :]]
    elif len(shape) != len(whole):
        entries = []
    sized = zip(entries, shape, strict=True) if entries else ()
    kept = [entry if size % _ways(entry, sharding.mesh) == 0 else None for entry, size in sized]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _ways(entry: str | tuple[str, ...] | None, mesh: Any) -> int:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)


def parameters_of(state: TrainState) -> dict[str, Any]:
    """The part of a state that a checkpoint keeps as parameters. It does not say which of them were trained, and has
    the average where there is one."""
    ema = {"ema": state.ema} if state.ema else {}
    return {"step": state.step, "values": state.trained | state.frozen, **ema}


def parameters_target(graph: ModelGraph, mesh: Mesh, config: OptimizerConfig) -> dict[str, Any]:
    """`parameters_of` for a restore without optimizer state: shapes, dtypes and shardings."""
    groups = assign_groups(graph.names, config) | dict.fromkeys(graph.unused, UNUSED)
    shapes = jax.eval_shape(lambda: init_state(graph.empty(), groups, optax.identity(), config))
    shardings = state_shardings(shapes, graph.shardings(mesh), mesh)
    return abstract(parameters_of(shapes), parameters_of(shardings))


def state_of(parameters: Mapping[str, Any], optimizer: optax.OptState, like: TrainState) -> TrainState:
    """A state from the parts that a checkpoint keeps, trained and frozen as in `like`."""
    values = parameters["values"]
    return TrainState(
        step=parameters["step"],
        bad_step=jnp.full_like(parameters["step"], -1),
        trained={name: values[name] for name in like.trained},
        frozen={name: values[name] for name in like.frozen},
        optimizer=optimizer,
        ema=dict(parameters.get("ema", {})),
    )
