"""Answers planned by formula: weights, cache, what fits, bytes of a decoding step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rave_jax.config import ConfigError, load_file
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.plan.chips import parse_topology
from rave_jax.plan.generation import ROOM, Answering, answering
from rave_jax.plan.models import model_of

CONFIGS = Path(__file__).parents[2] / "configs"
TOPOLOGY = parse_topology("v5e:2x2")
ENTRY = 2 * 4 * 128 * 2 * 28 / 4
"""Of Qwen2.5-VL-7B: key and value of 4 kv heads of 128 bfloat16 numbers in 28 layers, over 4 tensor ways."""


def planned(name: str, **fields) -> Answering:
    config = load_file(CONFIGS / f"{name}.py")
    config = dataclasses.replace(config, **{"mesh": MeshConfig(fsdp=-1, tensor=4)} | fields)
    return answering(config, model_of(config.init)[0], TOPOLOGY)


@pytest.fixture(scope="module")
def gaze() -> Answering:
    return planned("qwen2_5_vl_7b_gaze_video_sft")


def test_cache_and_rows_fill_the_room_beside_the_weights(gaze: Answering) -> None:
    assert gaze.entry == ENTRY and (gaze.context, gaze.visual) == (10240, 8192)
    assert gaze.weights == pytest.approx(8.29e9 * 2 / 4, rel=0.01), "bfloat16, a quarter on each chip"
    room = ROOM * TOPOLOGY.chip.hbm - gaze.weights
    assert gaze.rows * ENTRY * gaze.context <= room < (gaze.rows + 1) * ENTRY * gaze.context
    assert gaze.longest * ENTRY <= room < (gaze.longest + 1) * ENTRY


def test_a_step_reads_weights_and_cache_and_gaze_a_quarter_of_the_pictures(gaze: Answering) -> None:
    tower_and_table = 0.67e9 + 152064 * 3584
    assert gaze.weights - gaze.decoded == pytest.approx(tower_and_table * 2 / 4, rel=0.02)
    assert gaze.dense == pytest.approx(gaze.decoded + gaze.rows * gaze.context * ENTRY)
    visual = gaze.rows * gaze.visual * ENTRY
    skipped = gaze.dense - gaze.sparse
    assert 0.7 * visual < skipped < 0.75 * visual, "three quarters, less the descriptors that are read"
    text = "\n".join(gaze.lines())
    assert "by formula, not compiled and not measured" in text and "that mechanisms skip" in text


def test_what_axes_of_rows_hold_comes_over_the_links_in_each_step(gaze: Answering) -> None:
    """Over two chips in each dimension a chip has a link in both."""
    split = planned("qwen2_5_vl_7b_gaze_video_sft", mesh=MeshConfig(fsdp=-1))
    assert gaze.gathered == 0 and "from other chips" not in "\n".join(gaze.lines())
    assert split.decoded == pytest.approx(gaze.decoded, rel=0.01)
    assert split.gathered == pytest.approx(3 * split.decoded, rel=0.01)
    assert split.links == 2 * TOPOLOGY.chip.link_bandwidth
    assert "weights that come from other chips in a step, " in "\n".join(split.lines())


def test_what_does_not_fit_has_no_rows() -> None:
    found = planned("qwen2_5_vl_72b_rave_sft")
    assert (found.rows, found.longest) == (0, 0)
    assert "not one row of 4,096 tokens fits" in "\n".join(found.lines())


def test_context_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.context is 2, expected 1"):
        planned("qwen2_5_vl_7b_rave_sft", mesh=MeshConfig(fsdp=-1, context=2))
