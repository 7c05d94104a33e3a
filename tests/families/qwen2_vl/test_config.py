"""Configs of released Qwen2-VL models, in each style that they come in, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.config import ConfigError
from rave_jax.families import family_for
from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen2_vl import FAMILY, presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import num_bytes
from tests.families.test_families import abstract, assert_one_to_one, released


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("qwen2-vl-7b-instruct-olmocr", presets.qwen2_vl_7b()),  # states the whole tower
        ("qwen2-vl-7b-ain", presets.qwen2_vl_7b()),  # leaves out what is the default
        ("qwen2-vl-2b-instruct-awq", presets.qwen2_vl_2b()),
    ],
)
def test_presets_are_the_released_configs(shared_data: Path, name: str, preset: VlmConfig) -> None:
    hf = released(shared_data, name)
    assert family_for(hf) is FAMILY and FAMILY.parse(hf) == preset


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("qwen2-vl-7b-instruct-olmocr", "bfloat16", 16_582_751_232),
        ("qwen2-vl-7b-ain", "float32", 33_165_502_464),
    ],
)
def test_the_7b_takes_the_published_bytes_and_keys(shared_data: Path, name: str, dtype: str, size: int) -> None:
    index = json.loads((shared_data / "configs" / name / "model.safetensors.index.json").read_text())
    model = abstract(presets.qwen2_vl_7b(), ModelOptions(param_dtype=dtype))
    assert num_bytes(model) == index["metadata"]["total_size"] == size
    rules = FAMILY.tensors(model.config)
    assert len(rules) == 730
    assert {rule.hf_key for rule in rules} == set(index["weight_map"])
    assert_one_to_one(model, rules)


def test_a_quantised_checkpoint_is_refused_by_name(shared_data: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config.*awq"):
        load_config(shared_data / "configs" / "qwen2-vl-2b-instruct-awq")


@pytest.mark.parametrize("config", [presets.tiny(), presets.tiny(tie_embeddings=False), presets.qwen2_vl_7b()])
def test_a_rendered_config_parses_to_itself(config: VlmConfig) -> None:
    assert FAMILY.parse(json.loads(json.dumps(FAMILY.render(config)))) == config


def test_a_config_as_transformers_5_saves_it() -> None:
    from transformers import Qwen2VLConfig

    config = presets.tiny(tie_embeddings=False)
    nested = json.loads(Qwen2VLConfig(**FAMILY.render(config)).to_json_string())
    assert "text_config" in nested
    assert FAMILY.parse(nested) == config
    nested["vision_config"]["rope_parameters"]["rope_theta"] = 500.0
    parsed = FAMILY.parse(nested)
    assert parsed != config and FAMILY.parse(FAMILY.render(parsed)) == parsed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "vision_config: 'hidden_act' is 'gelu', expected 'quick_gelu'"),
        ({"mlp_ratio": 2.5}, "vision_config: 'mlp_ratio' is 2.5, expected an integer"),
        ({"in_chans": 1}, "vision_config: 'in_chans' is 1, expected 3 as 'in_channels' has it"),
        ({"spatial_patch_size": 16}, "vision_config: 'spatial_patch_size' is 16, expected 4 as 'patch_size' has it"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "vision_config: 'rope_type' is 'yarn', expected 'axial'"),
        ({"hidden_size": 64}, "vision.out_size is 64, expected text.hidden_size 32"),
        ({"embed_dim": 10}, "hidden_size is 10, expected num_heads 2 times a multiple of 4"),
    ],
)
def test_a_tower_that_we_do_not_compute_is_refused(change: dict, message: str) -> None:
    hf = FAMILY.render(presets.tiny())
    hf["vision_config"] |= change
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(hf)
