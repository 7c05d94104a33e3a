"""A whole run through train.py in seconds: `get_config()` for the command line."""

from __future__ import annotations

import os

from rave_jax.attention import Rave
from rave_jax.checkpoint.tiny import Tiny
from rave_jax.data.config import DataConfig
from rave_jax.evaluation.config import Report
from rave_jax.models.config import ModelOptions
from rave_jax.training.config import TrainConfig
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup


def get_config() -> TrainConfig:
    """Gates trained faster than the rest, a frozen tower, a checkpoint every second step."""
    return TrainConfig(
        output_dir=os.environ.get("SMALL_RUN", "small_run"),
        init=Tiny(
            hidden_size=32, num_layers=1, mlp_size=32, vision_hidden_size=32, vision_layers=1, vision_mlp_size=32
        ),
        model=ModelOptions(mechanisms=(Rave(rank=2),)),
        data=DataConfig(rows=8),
        optimizer=OptimizerConfig(
            groups=(
                ParameterGroup("tower", r"^vision\.", frozen=True),
                ParameterGroup("gate", "mechanisms", learning_rate=3.0),
            )
        ),
        steps=10,
        log_every=1,
        save_every=2,
        final=(Report(),),
    )
