"""The same run without its mechanisms: what they add to a step is what is between the two."""

from __future__ import annotations

import dataclasses
import re

from rave_jax.checkpoint.target import abstract_model
from rave_jax.families.config import VlmConfig
from rave_jax.models.parameters import named_parameters
from rave_jax.training.config import TrainConfig


def without_mechanisms(config: TrainConfig, vlm: VlmConfig) -> TrainConfig:
    """The config with plain attention, and without groups of the optimizer that had only the mechanisms' parameters.

    Args:
        config: of a run.
        vlm: its model.
    """
    model = dataclasses.replace(config.model, mechanisms=())
    groups = config.optimizer.groups
    names = named_parameters(abstract_model(vlm, model))
    taking = [next((group for group in groups if re.search(group.pattern, name)), None) for name in names]
    left = tuple(group for group in groups if group in taking)
    return dataclasses.replace(config, model=model, optimizer=dataclasses.replace(config.optimizer, groups=left))
