"""Qwen3.5's configs and keys, with pictures and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.checkpoint.tiny import Tiny, write_tiny
from rave_jax.config import ConfigError
from rave_jax.families import TensorRule, family_for, family_named
from rave_jax.families.config import VlmConfig
from rave_jax.families.directory import processor_files, with_processor
from rave_jax.families.qwen3_5 import presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import count, locate, named_parameters
from rave_jax.models.vlm import Vlm
from tests.families.test_families import abstract, assert_one_to_one, released

NAME = "qwen3.5-vl"


def text_alone(config: VlmConfig) -> dict[str, Any]:
    """The HF config of the decoder of a model with pictures."""
    return family_named("qwen3_5").render(config)["text_config"]


def test_the_preset_is_the_released_config(shared_data: Path) -> None:
    config = family_named("qwen3_5").parse(released(shared_data, NAME))
    assert presets.qwen3_5_800m() == with_processor(config, processor_files(shared_data / "configs" / NAME))


def test_its_tensors_are_its_parameters() -> None:
    config = presets.qwen3_5_800m()
    model, rules = abstract(config, ModelOptions(param_dtype="bfloat16")), family_named("qwen3_5").tensors(config)
    assert_one_to_one(model, rules)
    assert count(model) == sum(int(np.prod(rule.shape)) for rule in rules)
    shapes = {rule.hf_key: rule.shape for rule in rules}
    assert shapes["model.language_model.layers.0.linear_attn.in_proj_qkv.weight"] == (6144, 1024)
    assert shapes["model.language_model.layers.0.linear_attn.conv1d.weight"] == (6144, 1, 4)
    assert shapes["model.language_model.layers.3.self_attn.q_proj.weight"] == (2 * 8 * 256, 1024)
    assert "model.language_model.layers.3.linear_attn.A_log" not in shapes
    wide = {rule.hf_key.split(".", 4)[-1] for rule in rules if dtype_of(model, rule) == np.float32}
    assert wide == {"linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight"}


def dtype_of(model: Vlm, rule: TensorRule) -> Any:
    return named_parameters(model)[locate(model, rule).path].dtype


def test_rope_scaling_counts_where_rope_parameters_are_stated_too() -> None:
    """As in transformers, so that a scaling that we do not compute is never passed over."""
    text = text_alone(presets.qwen3_5_800m()) | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(ConfigError, match="'rope_type' is 'yarn', expected 'default'"):
        family_for(text).parse(text)


def test_configs_as_transformers_5_saves_them() -> None:
    from transformers import Qwen3_5Config, Qwen3_5TextConfig

    config = presets.qwen3_5_800m()
    rendered = family_named("qwen3_5").render(config)
    saved = json.loads(Qwen3_5Config(**rendered).to_json_string())
    assert saved["vision_config"]["model_type"] == "qwen3_5_vision"
    parsed = family_for(saved).parse(saved)
    assert parsed == family_for(rendered).parse(rendered)
    assert parsed.text == config.text
    text = json.loads(Qwen3_5TextConfig(**text_alone(config)).to_json_string())
    assert family_for(text).model_type == "qwen3_5_text"
    assert family_for(text).parse(text).text == config.text
    # Without layer types every fourth layer attends; without a part that turns, a quarter of each head does.
    bare = {k: v for k, v in text.items() if k not in ("layer_types", "rope_parameters")}
    assert family_for(bare).parse(bare | {"rope_theta": 1e7}).text == config.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "qwen3_5_moe_text"},
            "'model_type' is 'qwen3_5_moe_text', supported are .*; qwen3_5_text is an",
        ),
        ({"attn_output_gate": False}, "'attn_output_gate' is False, expected True"),
        ({"attention_bias": True}, "'attention_bias' is True, expected False"),
        ({"mlp_only_layers": [1]}, r"'mlp_only_layers' is \[1\], expected \[\]"),
        ({"mamba_ssm_dtype": "bfloat16"}, "'mamba_ssm_dtype' is 'bfloat16', expected 'float32'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'rope_type' is 'yarn', expected 'default'"),
        ({"rope_parameters": {"mrope_interleaved": False}}, "'mrope_interleaved' is False, expected True"),
        (
            {"rope_parameters": {"partial_rotary_factor": 2}},
            "'partial_rotary_factor' is 2, expected a number from 0",
        ),
        ({"rope_parameters": {"mrope_section": [1, 2, 3]}}, "mrope_section is .*, expected numbers that add up"),
        (
            {"layer_types": ["full_attention"]},
            "'layer_types' is a list of 1, expected a list with a name for each",
        ),
        ({"layer_types": "full_attention"}, "'layer_types' is 'full_attention', expected a list"),
        ({"layer_types": ["linear_attention"] * 24}, "'layer_types' has no 'full_attention', expected at least one"),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 12},
            "'layer_types' says 'sliding_attention' of layer 1, expected 'linear_attention' or 'full_attention'",
        ),
        ({"linear_num_value_heads": 24}, "value_heads is 24, expected a multiple of key_heads 16"),
        ({"linear_conv_kernel_dim": 1}, "'linear_conv_kernel_dim' is 1, expected an integer from 2"),
        ({"linear_key_head_dim": "128"}, "'linear_key_head_dim' is '128', expected an integer"),
    ],
)
def test_what_we_do_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    hf = text_alone(presets.qwen3_5_800m()) | change
    with pytest.raises(ConfigError, match=message):
        family_for(hf).parse(hf)


def test_features_for_layers_of_the_decoder_are_refused() -> None:
    hf = family_named("qwen3_5").render(presets.qwen3_5_800m())
    hf["vision_config"]["deepstack_visual_indexes"] = [1]
    with pytest.raises(ConfigError, match=r"vision_config: 'deepstack_visual_indexes' is \[1\], expected \[\]"):
        family_for(hf).parse(hf)
    with pytest.raises(ConfigError, match="'model_type' is 'qwen3_5_moe', supported are "):
        family_for(hf | {"model_type": "qwen3_5_moe"})


def test_tensors_that_predict_several_tokens_are_left_unread_and_others_are_not(tmp_path: Path) -> None:
    """As in transformers; the rest goes out byte for byte, in the number types of released files."""
    own = write_tiny(tmp_path / "own", Tiny(family="qwen3_5_text", hidden_size=32, num_layers=2, mlp_size=32))
    tensors = load_file(own / "model.safetensors")
    half = {
        k: v if k.endswith(("A_log", "linear_attn.norm.weight")) else v.astype(ml_dtypes.bfloat16)
        for k, v in tensors.items()
    }
    extra = {"mtp.fc.weight": np.ones((4, 4), np.float32)}
    save_file(half | extra, own / "model.safetensors")
    out = export_hf(import_hf(own, dtypes="stored"), tmp_path / "out", own)
    written = load_file(out / "model.safetensors")
    assert {k: (v.dtype, v.tobytes()) for k, v in written.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in half.items()
    }
    save_file(half | {"mtp_fc.weight": extra["mtp.fc.weight"]}, own / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mtp_fc.weight .*: no parameter of the model belongs to it"):
        import_hf(own)
    model = import_hf(out, ModelOptions(param_dtype="bfloat16"))
    log = named_parameters(model)["decoder.layer_runs.0.layers.delta.decay_log"][...]
    assert log.dtype == jax.numpy.float32
