"""The quickstart with three quarters of the visual tokens leaving after the first layer, in training and generation."""

import dataclasses

import quickstart

from rave_jax.attention import Pruning
from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """All else is the quickstart's."""
    base = quickstart.get_config()
    pruning = Pruning(keep=0.25, layers=(0,))
    model = dataclasses.replace(base.model, mechanisms=(*base.model.mechanisms, pruning))
    return dataclasses.replace(base, output_dir="runs/quickstart_pruning", model=model)
