"""Gates of heads in whole models: chunks, remat, layer runs and a mesh of eight change nothing."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from rave_jax.attention import Moh, Rave, Sads, Vhr
from rave_jax.batch import Batch
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made
from tests.models.outcome import MESHES, check_mesh_of_eight, outcome, same

CONFIG = tiny(vocab_size=64, num_layers=4, vision_depth=1, full_attention_blocks=())
OPTIONS = ModelOptions(
    (
        Moh("learned", balance=0.5, layers=(0, 1)),
        Moh(shared=0.25, layers=(2,)),
        Sads(heads=(1,), layers=(1, 2)),
        Vhr(heads=(0, 2), layers=(2, 3)),
        Rave(rank=2, layers=(3,)),
    )
)


@functools.cache
def rows() -> Batch:
    rng = np.random.default_rng(0)
    made_of = [[document([n, Visual(1, 4, 4), 3], CONFIG, rng), document([4], CONFIG, rng)] for n in range(1, 9)]
    return batch(made_of, CONFIG, tokens=24, patches=16)


@pytest.mark.slow
def test_gates_are_given_of_every_layer() -> None:
    gates = np.asarray(jax.jit(lambda m, b: m.forward(b, Want(gates=True)).gates)(made(CONFIG, OPTIONS), rows()))
    assert gates.shape == (4, 8, 24, 4)
    assert np.all(gates[1:3, ..., 1] == 0) and np.all(gates[3] == [2, 1, 2, 1])
    assert np.all(np.isin(gates[2], (0, 1, 2))) and np.all((gates[0] > 0).sum(-1) == 3)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"scan_layers": False}], ids=str)
def test_remat_and_layers_apart_change_nothing(change: dict[str, Any]) -> None:
    model = made(CONFIG, OPTIONS)
    other = made(CONFIG, dataclasses.replace(OPTIONS, **change))
    if "scan_layers" in change:
        for run in other.decoder.layer_runs:
            mine = next(one for one in model.decoder.layer_runs if one.start <= run.start < one.stop)
            n = run.start - mine.start
            run.layers = jax.tree.unflatten(
                jax.tree.structure(run.layers), [x[n : n + 1] for x in jax.tree.leaves(mine.layers)]
            )
    expected, found = outcome(model, rows()), outcome(other, rows())
    if "scan_layers" in change:
        expected, found = expected[1], found[1]
    same(found, expected)


@pytest.mark.slow
@MESHES
def test_a_mesh_of_eight_gives_the_same_numbers(layout: dict[str, int]) -> None:
    """Heads are split over the tensor axis, and a router compares those of all devices."""
    check_mesh_of_eight(CONFIG, OPTIONS, rows(), layout)
