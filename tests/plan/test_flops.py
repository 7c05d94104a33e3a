"""FLOPs of a step by formula: six for each number and token of what is trained, and what attention adds."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import get_args

import pytest

from rave_jax.attention import Rave
from rave_jax.checkpoint.target import abstract_model
from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.data.config import DataConfig
from rave_jax.families import released
from rave_jax.models.config import ModelOptions, Remat
from rave_jax.plan.flops import StepFlops, step_flops
from rave_jax.plan.models import model_of
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF
from rave_jax.training.state import ModelGraph

TOKENS, ROWS = 64, 2
VLM = tiny_config(Tiny())
TEXT = VLM.text


@functools.cache
def graph_of(mechanisms: tuple = ()) -> ModelGraph:
    return ModelGraph(abstract_model(VLM, ModelOptions(mechanisms=mechanisms)))


def flops(frozen: str = "vision", **options) -> StepFlops:
    config = TrainConfig(model=ModelOptions(**options), data=DataConfig(rows=ROWS, tokens=TOKENS, patches=36))
    graph = graph_of(config.model.mechanisms)
    return step_flops(config, VLM, graph, {name: not name.startswith(frozen) for name in graph.names})


def numbers(prefix: str) -> int:
    """Of the matrices whose names begin so."""
    graph = graph_of()
    return sum(
        math.prod(graph.shapes[name].shape)
        for name in graph.names
        if name.startswith(prefix) and name.endswith("weight") and "norm" not in name
    )


def pairs() -> float:
    return ROWS * TOKENS * (TOKENS + 1) / 2


def test_a_trained_number_costs_six_for_each_token() -> None:
    attention = 12 * TEXT.num_heads * TEXT.head_dim * TEXT.num_layers * pairs()
    trained = 6 * ROWS * TOKENS * (numbers("decoder.") + TEXT.vocab_size * TEXT.hidden_size)
    whole, without_tower = flops().model, trained + attention
    tower = whole - without_tower
    read = ROWS * (36 * (numbers("vision.") - numbers("vision.merger")) + 9 * numbers("vision.merger"))
    assert tower >= 2 * read, "of the frozen tower the forward pass"
    assert tower == pytest.approx(2 * read, rel=0.05), "and its attention"
    assert flops(frozen="nothing").model == pytest.approx(without_tower + 3 * tower)


def test_a_frozen_matrix_above_something_trained_costs_four() -> None:
    graph = graph_of()
    layers = 2 * ROWS * TOKENS * (numbers("decoder.") + TEXT.vocab_size * TEXT.hidden_size)
    config = TrainConfig(data=DataConfig(rows=ROWS, tokens=TOKENS, patches=36))
    only_table = step_flops(config, VLM, graph, {name: name == "embed.weight" for name in graph.names})
    assert flops().model - only_table.model == pytest.approx(layers)


def test_mechanisms_add_their_matrices_and_pair_products() -> None:
    plain, gated = flops(), flops(mechanisms=(Rave(rank=8),))
    heads = TEXT.num_heads + TEXT.num_kv_heads
    matrices = TEXT.num_layers * heads * TEXT.head_dim * (8 + 1)
    scores = 8 * TEXT.num_heads * TEXT.num_layers * pairs()
    assert plain.mechanisms == 0
    assert gated.mechanisms == pytest.approx(gated.model - plain.model)
    assert gated.mechanisms == pytest.approx(6 * (matrices * ROWS * TOKENS + scores))


def test_rematerialisation_computes_again_what_a_layer_does_not_keep() -> None:
    matmuls = 2 * ROWS * TOKENS * numbers("decoder.")
    attention = 4 * TEXT.num_heads * TEXT.head_dim * TEXT.num_layers * pairs()
    expected = {"full": matmuls + attention, "offload": matmuls + attention, "attention": matmuls, "dots": attention}
    expected |= dict.fromkeys(("none", "dots_and_attention", "all_dots"), 0.0)
    assert set(expected) == set(get_args(Remat)), "the loss computes no logits again"
    for remat, again in expected.items():
        assert flops(remat=remat).again == pytest.approx(again)
    tower = (flops(frozen="nothing").model - flops().model) / 2
    assert flops(frozen="nothing", remat="none", vision_remat="full").again == pytest.approx(tower)


def test_a_released_model_whose_file_was_not_at_hand_has_its_published_size() -> None:
    graph = ModelGraph(abstract_model(model_of(FromHF("nowhere/Qwen2.5-VL-72B-Instruct"))[0], ModelOptions()))
    assert sum(math.prod(shape.shape) for shape in graph.shapes.values()) / 1e9 == pytest.approx(73.4, rel=0.01)


def test_shapes_are_those_of_the_file_where_there_is_one(tmp_path) -> None:
    assert model_of(FromHF("nowhere/Qwen3-VL-8B-Instruct"))[0] == released()["Qwen3-VL-8B-Instruct"]()
    config = dataclasses.replace(TrainConfig(), init=Tiny())
    assert model_of(config.init) == (VLM, "the config's own sizes")
