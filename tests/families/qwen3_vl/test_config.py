"""Qwen3-VL's config, keys and bytes against the released files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rave_jax.config import ConfigError
from rave_jax.families import family_for, family_named
from rave_jax.families.config import VlmConfig
from rave_jax.families.directory import processor_files, with_processor
from rave_jax.families.qwen3_vl import presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import count, num_bytes
from tests.families.test_families import abstract, assert_one_to_one, released

EIGHT = "qwen3-vl-8b-cosmos-reason2"


@pytest.mark.parametrize(
    ("size", "name"), [("4b", "qwen3-vl-4b-instruct"), ("8b", EIGHT), ("32b", "qwen3-vl-32b-like")]
)
def test_presets_are_the_released_configs(shared_data: Path, size: str, name: str) -> None:
    config = family_named("qwen3_vl").parse(released(shared_data, name))
    files = processor_files(shared_data / "configs" / name)
    if not files.image:  # the pixel statistics of all sizes are alike
        files = processor_files(shared_data / "configs" / EIGHT)
    assert getattr(presets, f"qwen3_vl_{size}")() == with_processor(config, files)


def test_the_8b_takes_the_published_bytes_and_keys(shared_data: Path) -> None:
    config = presets.qwen3_vl_8b()
    model, rules = abstract(config, ModelOptions(param_dtype="bfloat16")), family_named("qwen3_vl").tensors(config)
    keys, embedding = (
        json.loads((shared_data / "configs" / name / "model.safetensors.index.json").read_text())
        for name in (EIGHT, "qwen3-vl-embedding-8b")
    )
    assert len(rules) == 750
    assert {rule.hf_key for rule in rules} == set(keys["weight_map"])
    assert_one_to_one(model, rules)
    # The model that gives embeddings is the same without a head.
    head = config.text.vocab_size * config.text.hidden_size
    assert set(keys["weight_map"]) - set(embedding["weight_map"]) == {"lm_head.weight"}
    assert count(model) - head == embedding["metadata"]["total_parameters"] == 8_144_793_840
    assert num_bytes(model) - 2 * head == embedding["metadata"]["total_size"] == 16_289_587_680


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(presets.qwen3_vl_2b(), 2_127_532_032, 625), (presets.qwen3_vl_32b(), 33_357_390_064, 1058)],
)
def test_other_sizes_have_as_many_parameters_as_in_transformers(
    config: VlmConfig, parameters: int, tensors: int
) -> None:
    assert count(abstract(config, ModelOptions())) == parameters
    assert len(family_named("qwen3_vl").tensors(config)) == tensors


@pytest.mark.parametrize("config", [presets.tiny(), presets.tiny(tie_embeddings=False), presets.qwen3_vl_2b()])
def test_a_rendered_config_parses_to_itself(config: VlmConfig) -> None:
    """Beside the statistics of pixels, which are the processor's."""
    family = family_named("qwen3_vl")
    assert config.vision is not None
    plain = replace(
        config.vision, pixel_mean=presets.tiny().vision.pixel_mean, pixel_std=presets.tiny().vision.pixel_std
    )
    assert family.parse(json.loads(json.dumps(family.render(config)))) == replace(config, vision=plain)


def test_configs_as_transformers_5_saves_them() -> None:
    from transformers import Qwen3VLConfig

    config, family = presets.tiny(), family_named("qwen3_vl")
    saved = json.loads(Qwen3VLConfig(**family.render(config)).to_json_string())
    assert "rope_parameters" in saved["text_config"]
    assert family_for(saved).parse(saved) == config


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (None, {"text_config": None}, "config.json: 'text_config' is missing"),
        (None, {"vision_config": {}}, "config.json: 'vision_config' is missing"),
        ("text_config", {"hidden_size": None}, "text_config: 'hidden_size' is missing"),
        ("text_config", {"attention_bias": True}, "text_config: 'attention_bias' is True, expected False"),
        (
            "text_config",
            {"rope_scaling": {"rope_type": "yarn"}},
            "text_config: 'rope_type' is 'yarn', expected 'default'",
        ),
        (
            "text_config",
            {"rope_scaling": {"mrope_interleaved": False}},
            "text_config: 'mrope_interleaved' is False, expected True",
        ),
        ("text_config", {"rope_scaling": {"mrope_section": [6, 6]}}, "mrope_section"),
        (
            "vision_config",
            {"hidden_act": "gelu"},
            "vision_config: 'hidden_act' is 'gelu', expected 'gelu_pytorch_tanh'",
        ),
        ("vision_config", {"num_position_embeddings": 24}, "'num_position_embeddings' is 24, expected a square number"),
        (
            "vision_config",
            {"deepstack_visual_indexes": [1, 0]},
            r"deep_blocks is \(1, 0\), expected numbers from 0 to 2",
        ),
        ("vision_config", {"deepstack_visual_indexes": [3]}, r"deep_blocks is \(3,\), expected numbers from 0 to 2"),
        ("vision_config", {"rope_parameters": {"rope_type": "dynamic"}}, "'rope_type' is 'dynamic', expected 'axial'"),
    ],
)
def test_what_we_do_not_compute_is_refused(part: str | None, change: dict[str, Any], message: str) -> None:
    hf = family_named("qwen3_vl").render(presets.tiny())
    hf = hf | (change if part is None else {part: hf[part] | change})
    with pytest.raises(ConfigError, match=message):
        family_for(hf).parse(hf)
