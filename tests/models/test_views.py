"""Pictures in no order, steered scores and arrows in whole models: remat and a mesh of eight change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from rave_jax.attention import Arrow, Pine, Rave, Steer, VisualBias
from rave_jax.batch import Batch
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.models.config import ModelOptions
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made
from tests.models.test_heads import outcome, outcome_of_eight, same

CONFIG = tiny(vocab_size=64, num_layers=4, vision_depth=1, full_attention_blocks=())
OPTIONS = ModelOptions(
    (
        Pine(2, wrapped=0, layers=(0, 1)),
        Rave(rank=2, layers=(1, 3)),
        Steer(0.5, rows="all", layers=(2,)),
        Arrow(6, 2, layers=(3,)),
        VisualBias(0.3, layers=(0,)),
    )
)


def rows() -> Batch:
    """Rows of two pictures and a text behind them."""
    rng = np.random.default_rng(0)
    parts = [[n, Visual(1, 4, 4), Visual(1, 4, 2), 3] for n in range(1, 9)]
    return batch([[document([*part], CONFIG, rng), document([4], CONFIG, rng)] for part in parts], CONFIG, 24, 24)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"fsdp": 2, "tensor": 2, "data": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_a_mesh_of_eight_gives_the_same_numbers(layout: dict[str, int]) -> None:
    model = made(CONFIG, OPTIONS)
    same(outcome_of_eight(model, rows(), layout), outcome(model, rows()))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": "full"}, {"attention": "reference"}], ids=str)
def test_remat_and_the_reference_change_nothing(change: dict[str, Any]) -> None:
    expected = outcome(made(CONFIG, OPTIONS), rows())
    same(outcome(made(CONFIG, dataclasses.replace(OPTIONS, **change)), rows()), expected)
