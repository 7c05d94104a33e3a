"""The quickstart with MoBA beside RAVE in the last layers: blocks of eight tokens, of which a query reads three."""

import dataclasses

import quickstart

from rave_jax.attention import Moba
from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """Blocks as small as the quickstart's rows are; all else is the quickstart's."""
    base = quickstart.get_config()
    model = dataclasses.replace(base.model, mechanisms=(*base.model.mechanisms, Moba(block=8, top_k=3, layers=(1,))))
    return dataclasses.replace(base, output_dir="runs/quickstart_moba", model=model)
