"""Ablation of the quickstart: the gate learns in the first half of the run and is kept as it is in the second."""

import dataclasses

import quickstart

from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """The quickstart with a gate that freezes half-way."""
    base = quickstart.get_config()
    gate = dataclasses.replace(base.optimizer.groups[0], freeze_after=base.steps // 2)
    return dataclasses.replace(
        base,
        output_dir="runs/quickstart_frozen_after",
        optimizer=dataclasses.replace(base.optimizer, groups=(gate,)),
    )
