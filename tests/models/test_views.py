"""Pictures in no order, steered scores and arrows in whole models: remat and a mesh of eight change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rave_jax.attention import Arrow, Pine, Rave, Steer, VisualBias
from rave_jax.batch import Batch
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.models.config import ModelOptions
from tests.models.layout import Visual, batch, document
from tests.models.outcome import MESHES, check_mesh_of_eight, check_options

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
@MESHES
def test_a_mesh_of_eight_gives_the_same_numbers(layout: dict[str, int]) -> None:
    check_mesh_of_eight(CONFIG, OPTIONS, rows(), layout)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": "full"}, {"attention": "reference"}], ids=str)
def test_remat_and_the_reference_change_nothing(change: dict[str, Any]) -> None:
    check_options(CONFIG, OPTIONS, rows(), change)
