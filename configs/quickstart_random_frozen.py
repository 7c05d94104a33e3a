"""Ablation of the quickstart: a gate that is random and never trained. What a learned gate adds must exceed this."""

import dataclasses

import quickstart

from rave_jax.attention import Rave
from rave_jax.models.config import ModelOptions
from rave_jax.training.config import TrainConfig
from rave_jax.training.optimizers import ParameterGroup


def get_config() -> TrainConfig:
    """The quickstart with a random, frozen gate of the same shape."""
    base = quickstart.get_config()
    frozen = ParameterGroup(name="gate", pattern=quickstart.GATE_PARAMETERS, frozen=True)
    return dataclasses.replace(
        base,
        output_dir="runs/quickstart_random_frozen",
        model=ModelOptions(mechanisms=(Rave(rank=8, start="random"),)),
        optimizer=dataclasses.replace(base.optimizer, groups=(frozen,)),
    )
