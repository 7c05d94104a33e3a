"""The quickstart with Sparsifiner in place of RAVE: a learned map chooses half of the blocks of eight tokens."""

import dataclasses

import quickstart

from rave_jax.attention import Sparsifiner
from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """The predictor learns from every second query; all else is the quickstart's."""
    base = quickstart.get_config()
    map_of_blocks = Sparsifiner(block=8, keep=0.5, rank=8, every=2)
    model = dataclasses.replace(base.model, mechanisms=(map_of_blocks,))
    # The rate of RAVE's gate is not for a predictor.
    optimizer = dataclasses.replace(base.optimizer, groups=())
    return dataclasses.replace(base, output_dir="runs/quickstart_sparsifiner", model=model, optimizer=optimizer)
