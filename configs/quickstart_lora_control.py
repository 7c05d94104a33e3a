"""Ablation of the quickstart: no fewer extra parameters, spent on low-rank updates of query and key instead of a gate.

A gate of rank 8 here has 1,448 parameters a layer, an adapter of rank 4 on query and key 1,664, of rank 3 1,248.
"""

import dataclasses

import quickstart

from rave_jax.models.config import Lora, ModelOptions
from rave_jax.training.config import TrainConfig
from rave_jax.training.optimizers import ParameterGroup


def get_config() -> TrainConfig:
    """The quickstart with adapters in place of the gate, trained at the gate's learning rate."""
    base = quickstart.get_config()
    gate = base.optimizer.groups[0]
    adapter = ParameterGroup("adapter", r"\.adapter\.", gate.learning_rate, gate.weight_decay)
    return dataclasses.replace(
        base,
        output_dir="runs/quickstart_lora_control",
        model=ModelOptions(lora=Lora(rank=4, alpha=8.0)),
        optimizer=dataclasses.replace(base.optimizer, groups=(adapter,)),
    )
