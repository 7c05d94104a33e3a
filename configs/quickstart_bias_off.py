"""Ablation of the quickstart: the plain backbone, no bias on attention."""

import dataclasses

import quickstart

from rave_jax.models.config import ModelOptions
from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """The quickstart without its mechanism and its parameter group."""
    base = quickstart.get_config()
    return dataclasses.replace(
        base,
        output_dir="runs/quickstart_bias_off",
        model=ModelOptions(),
        optimizer=dataclasses.replace(base.optimizer, groups=()),
    )
