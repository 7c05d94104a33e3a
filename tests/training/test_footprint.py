"""A batch or an evaluation that no memory holds is refused before any of it is made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rave_jax.config import ConfigError
from rave_jax.data.config import DataConfig, Stage
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.parallel.memory import check_memory
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.training.config import TrainConfig
from rave_jax.training.footprint import least_activations, least_spread
from rave_jax.training.optimizers import OptimizerConfig


def test_the_least_that_a_batch_takes_is_its_patches_and_the_inputs_of_all_layers() -> None:
    vlm = tiny(num_layers=3)
    assert vlm.vision is not None
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    data = DataConfig(rows=16, tokens=8, patches=4, stages=(Stage(), Stage(5, tokens=20, patches=12)))
    config = TrainConfig(data=data, optimizer=OptimizerConfig(accumulation=2))
    pixels, inputs = least_activations(config, vlm, mesh)
    assert pixels.shape == (16, 12, vlm.vision.patch_width) and inputs.shape == (3, 8, 20, vlm.text.hidden_size)
    assert pixels.sharding.shard_shape(pixels.shape)[0] == 4 and inputs.sharding.shard_shape(inputs.shape)[1] == 2
    large = dataclasses.replace(config, data=dataclasses.replace(data, rows=2**20, stages=(Stage(),), tokens=1024))
    with pytest.raises(ConfigError, match=r"the rows of a batch need .* GB of memory, but this machine has"):
        check_memory(least_activations(large, vlm, mesh), "the rows of a batch")


def test_arrays_whose_place_is_not_known_take_an_even_share_of_each_device() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    shapes = {"cache": jax.ShapeDtypeStruct((5, 7), jnp.bfloat16), "seen": jax.ShapeDtypeStruct((3,), bool)}
    (spread,) = jax.tree.leaves(least_spread(shapes, mesh))
    assert spread.sharding.shard_shape(spread.shape) == (19,) and spread.dtype.itemsize == 1, "73 bytes on four devices"
