"""What a checkpoint is read into: the model without its numbers, where they go, and those that begin fresh."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, Sharding, SingleDeviceSharding

from rave_jax.families.config import VlmConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters, param_axes
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.memory import check_memory
from rave_jax.parallel.sharding import named_sharding


def abstract_model(config: VlmConfig, options: ModelOptions) -> Vlm:
    """The model without its numbers."""
    return jax.eval_shape(lambda: Vlm(config, options, key=jax.random.key(0)))


def parameter_shardings(model: Vlm, mesh: Mesh | AbstractMesh | None) -> dict[str, Sharding]:
    """Where each parameter goes: by the sharding rules on a mesh, else the first device."""
    params = named_parameters(model)
    if mesh is None:
        return dict.fromkeys(params, SingleDeviceSharding(jax.local_devices()[0]))
    return {path: named_sharding(param_axes(param), param.shape, mesh) for path, param in params.items()}


def check_room(model: Vlm, places: Mapping[str, Sharding], dtypes: Mapping[str, np.dtype] | None = None) -> None:
    """Refuse a model whose parameters cannot fit into memory, before any is read.

    Args:
        model: abstract.
        places: the sharding of each parameter.
        dtypes: number types, where they are not the model's own.

    Raises:
        ConfigError: says what is needed and what is there.
    """
    params = named_parameters(model)
    kinds = {path: param.dtype for path, param in params.items()} | dict(dtypes or {})
    tree = {
        path: jax.ShapeDtypeStruct(param.shape, kinds[path], sharding=places[path]) for path, param in params.items()
    }
    check_memory(tree, "the model's parameters")


def fresh_parameters(
    config: VlmConfig, options: ModelOptions, key: jax.Array, places: dict[str, Sharding]
) -> dict[str, jax.Array]:
    """Only these parameters of a newly made model: the compiler drops what the others would take."""
    if not places:
        return {}

    def make(key: jax.Array) -> dict[str, jax.Array]:
        params = named_parameters(Vlm(config, options, key=key))
        return {path: params[path][...] for path in places}

    return jax.jit(make, out_shardings=places)(key)
