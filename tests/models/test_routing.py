"""Mechanisms that route over blocks of tokens in whole models: remat, layer runs and a mesh of eight change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rave_jax.attention import BiFormer, Moba, Rave, Sparsifiner, Superlinear
from rave_jax.batch import Batch
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.layout import FixedRegions
from rave_jax.models.config import ModelOptions
from tests.inference.prompts import example_of
from tests.models.layout import Visual, batch, document
from tests.models.outcome import MESHES, check_mesh_of_eight, check_options

CONFIG = tiny(vocab_size=64, num_layers=4, vision_depth=1, full_attention_blocks=())
OPTIONS = ModelOptions(
    (
        Moba(4, top_k=2, layers=(0,)),
        Sparsifiner(4, keep=0.3, rank=4, every=2, layers=(1,)),
        Superlinear(4, spans=1, rank=4, layers=(2,)),
        Rave(rank=2, layers=(0, 2)),
        BiFormer(FixedRegions(2, 2), 16, top_k=1, layers=(3,)),
    )
)


def rows() -> Batch:
    """Rows with region numbers, a document of text behind each picture."""
    rng = np.random.default_rng(0)
    documents = [[document([n, Visual(1, 8, 8), 3], CONFIG, rng), document([4], CONFIG, rng)] for n in range(1, 9)]
    found = batch(documents, CONFIG, tokens=32, patches=64)
    region = np.zeros_like(found.info.region)
    for row, (first, _) in enumerate(documents):
        region[row, : len(first.tokens)] = example_of(first, CONFIG, OPTIONS.layout).info.region
    return found._replace(info=found.info._replace(region=region))


@pytest.mark.slow
@MESHES
def test_a_mesh_of_eight_gives_the_same_numbers(layout: dict[str, int]) -> None:
    _, (_, losses, _, _) = check_mesh_of_eight(CONFIG, OPTIONS, rows(), layout)
    assert losses["sparsifiner"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": "full"}, {"attention": "reference"}], ids=str)
def test_remat_and_the_reference_change_nothing(change: dict[str, Any]) -> None:
    check_options(CONFIG, OPTIONS, rows(), change)
