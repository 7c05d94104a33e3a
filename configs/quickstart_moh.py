"""The quickstart with a mixture of heads beside RAVE: half of them for all tokens, a quarter chosen for each token."""

import dataclasses

import quickstart

from rave_jax.attention import Moh
from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """Routers that learn, and a loss that spreads tokens over heads; all else is the quickstart's."""
    base = quickstart.get_config()
    heads = Moh("learned", balance=0.01)
    model = dataclasses.replace(base.model, mechanisms=(*base.model.mechanisms, heads))
    return dataclasses.replace(base, output_dir="runs/quickstart_moh", model=model)
