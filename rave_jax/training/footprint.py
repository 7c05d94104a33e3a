"""What a batch or an evaluation takes in memory at the least: what cannot fit is refused before any of it is made."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rave_jax.families.config import VlmConfig
from rave_jax.parallel.residual import Stream
from rave_jax.parallel.rows import batch_shardings
from rave_jax.parallel.sharding import named_sharding
from rave_jax.training.config import TrainConfig


def least_activations(config: TrainConfig, vlm: VlmConfig, mesh: Mesh) -> Any:
    """Arrays that exist together in a step, whatever is recomputed: the batch's patches, [B,P,C], and the input of
    every decoder layer, [L,B,T,D].

    Args:
        config: its largest rows count; of the batch, one micro-batch.
        vlm: the model.
        mesh: its devices share the rows, and perhaps their tokens.

    Returns:
        a pytree of shapes with shardings.
    """
    data, text, stages = config.data, vlm.text, config.data.stages
    tokens = max(data.tokens if stage.tokens is None else stage.tokens for stage in stages)
    patches = max(data.patches if stage.patches is None else stage.patches for stage in stages)
    rows = batch_shardings(mesh, data.rows).tokens.spec
    pixels = (data.rows, patches, vlm.vision.patch_width if vlm.vision else 0)
    inputs = (text.num_layers, data.rows // config.optimizer.accumulation, tokens, text.hidden_size)
    axes = (None, "batch", Stream(config.model.sequence_parallel).tokens, None)
    return (
        jax.ShapeDtypeStruct(pixels, jnp.uint8, sharding=NamedSharding(mesh, rows)),
        jax.ShapeDtypeStruct(inputs, config.model.compute, sharding=named_sharding(axes, inputs, mesh)),
    )


def least_spread(arrays: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Stands for arrays of which only the shapes are known: their bytes, spread evenly over the devices.

    Args:
        arrays: pytree of shapes.
        mesh: the devices.
    """
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.ShapeDtypeStruct((mesh.size * -(-total // mesh.size),), jnp.uint8, sharding=spread)
