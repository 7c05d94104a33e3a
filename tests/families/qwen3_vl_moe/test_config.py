"""Qwen3-VL with experts: its config, and the two formats that checkpoints hold its experts in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.config import ConfigError
from rave_jax.families import family_for, family_named
from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen3_vl_moe import presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import count, named_parameters
from tests.families.every import small
from tests.families.test_families import abstract, assert_one_to_one, released

NAME = "qwen3_vl_moe"
EXPERTS = ".mlp.experts."


def with_statistics(config: VlmConfig, like: VlmConfig) -> VlmConfig:
    """The config with the statistics of pixels of another, which a processor's file states."""
    assert config.vision is not None and like.vision is not None
    stated = {"pixel_mean": like.vision.pixel_mean, "pixel_std": like.vision.pixel_std}
    return replace(config, vision=replace(config.vision, **stated))


def test_the_preset_is_the_released_config(shared_data: Path) -> None:
    preset = presets.qwen3_vl_30b_a3b()
    config = family_named(NAME).parse(released(shared_data, "qwen3-vl-30b-a3b-instruct"))
    assert with_statistics(config, preset) == preset


def test_numbers_of_experts_that_a_config_leaves_out_are_those_of_transformers() -> None:
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig

    family = family_named(NAME)
    hf = family.render(presets.qwen3_vl_30b_a3b())
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        del hf["text_config"][key]
    experts, theirs = family.parse(hf).text.experts, Qwen3VLMoeTextConfig()
    assert experts is not None
    wanted = (theirs.num_experts, theirs.num_experts_per_tok, theirs.moe_intermediate_size)
    assert (experts.count, experts.chosen, experts.mlp_size) == wanted


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(presets.qwen3_vl_30b_a3b(), 31_070_754_032, 882), (presets.qwen3_vl_235b_a22b(), 235_670_022_896, 1388)],
)
def test_a_large_model_has_its_parameters_each_in_one_place(config: VlmConfig, parameters: int, tensors: int) -> None:
    """As many as transformers' own class has for this config."""
    model, rules = abstract(config, ModelOptions(param_dtype="bfloat16")), family_named(NAME).tensors(config)
    assert count(model) == parameters
    assert len({rule.hf_key for rule in rules}) == tensors
    assert_one_to_one(model, rules)


def test_experts_load_as_released_and_as_transformers_5_saves_them(tmp_path: Path) -> None:
    """Two formats whose keys are alike; what came in one goes out in it, byte for byte."""
    ours = export_hf(small(NAME, ModelOptions()).model(ModelOptions()), tmp_path / "released")
    tensors = load_file(ours / "model.safetensors")
    swapped = {key: np.ascontiguousarray(x.swapaxes(1, 2)) if EXPERTS in key else x for key, x in tensors.items()}
    assert {x.shape for key, x in tensors.items() if EXPERTS in key} == {(8, 32, 24), (8, 12, 32)}
    theirs = tmp_path / "saved"
    theirs.mkdir()
    (theirs / "config.json").write_bytes((ours / "config.json").read_bytes())
    save_file(swapped, theirs / "model.safetensors")
    first, second = (named_parameters(import_hf(folder)) for folder in (ours, theirs))
    for path, param in first.items():
        np.testing.assert_array_equal(second[path][...], param[...], err_msg=path)
    for folder in (ours, theirs):
        again = load_file(export_hf(import_hf(folder), tmp_path / f"again_{folder.name}", folder) / "model.safetensors")
        before = load_file(folder / "model.safetensors")
        assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in before.items()}
        assert all(again[key].tobytes() == x.tobytes() for key, x in before.items())

    key = next(key for key in tensors if key.endswith("experts.down_proj"))
    save_file(tensors | {key: tensors[key][:, 1:]}, theirs / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{key}.*8, 11, 32"):
        import_hf(theirs)


def test_configs_as_transformers_5_saves_them() -> None:
    from transformers import Qwen3VLMoeConfig

    family, config = family_named(NAME), small(NAME, ModelOptions()).config
    saved = json.loads(Qwen3VLMoeConfig(**family.render(config)).to_json_string())
    assert "num_local_experts" in saved["text_config"]
    assert family_for(saved).parse(saved) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "text_config: 'num_experts' is 0"),
        ({"num_experts_per_tok": 9}, "text_config: 'num_experts_per_tok' is 9, expected an integer from 1 to 8"),
        ({"mlp_only_layers": "1"}, "text_config: 'mlp_only_layers' is '1', expected a list of integers"),
    ],
)
def test_what_we_do_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    hf = family_named(NAME).render(small(NAME, ModelOptions()).config)
    with pytest.raises(ConfigError, match=message):
        family_for(hf).parse(hf | {"text_config": hf["text_config"] | change})
