"""The text families: what their configs mean, what is refused, and the sizes of released models."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.families import FAMILIES, family_for
from rave_jax.families.config import DynamicRope, LinearRope, SmoothRope, TextConfig, VlmConfig
from rave_jax.families.llama import presets as llama
from rave_jax.families.qwen2 import presets as qwen2
from rave_jax.families.qwen3 import presets as qwen3
from rave_jax.families.qwen3_moe import presets as qwen3_moe
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import count, num_bytes
from rave_jax.models.rope import text_rotation
from rave_jax.models.vlm import Vlm
from tests.families.test_families import abstract, assert_one_to_one

LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
RELEASED = {
    "SmolLM2-135M": (llama.smollm2_135m(), 134_515_008, 272),
    "SmolLM2-360M": (llama.smollm2_360m(), 361_821_120, 290),
    "SmolLM2-1.7B": (llama.smollm2_1_7b(), 1_711_376_384, 218),
    "Llama-2-7b": (llama.llama_2_7b(), 6_738_415_616, 291),
    "Qwen2-0.5B": (qwen2.qwen2_0_5b(), 494_032_768, 290),
    "Qwen2-7B": (qwen2.qwen2_7b(), 7_615_616_512, 339),
    "Qwen3-0.6B": (qwen3.qwen3_0_6b(), 596_049_920, 310),
    "Qwen3-1.7B": (qwen3.qwen3_1_7b(), 1_720_574_976, 310),
    "Qwen3-4B": (qwen3.qwen3_4b(), 4_022_468_096, 398),
    "Qwen3-8B": (qwen3.qwen3_8b(), 8_190_735_360, 399),
    "Qwen3-14B": (qwen3.qwen3_14b(), 14_768_307_200, 443),
    "Qwen3-32B": (qwen3.qwen3_32b(), 32_762_123_264, 707),
    "Qwen3-30B-A3B": (qwen3_moe.qwen3_30b_a3b(), 30_532_122_624, 18_867),
    "Qwen3-235B-A22B": (qwen3_moe.qwen3_235b_a22b(), 235_093_634_560, 36_945),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_has_the_parameters_of_the_release(name: str) -> None:
    config, parameters, tensors = RELEASED[name]
    model = abstract(config, ModelOptions(param_dtype="bfloat16"))
    assert (count(model), num_bytes(model)) == (parameters, 2 * parameters)
    rules = FAMILIES[config.family].tensors(config)
    assert len(rules) == tensors
    assert_one_to_one(model, rules)


@pytest.mark.parametrize(
    ("name", "all_of_them", "but_embeddings"),
    [
        ("Qwen3-0.6B", 0.6, 0.44),
        ("Qwen3-1.7B", 1.7, 1.4),
        ("Qwen3-4B", 4.0, 3.6),
        ("Qwen3-8B", 8.2, 6.95),
        ("Qwen3-14B", 14.8, 13.2),
        ("Qwen3-32B", 32.8, 31.2),
    ],
)
def test_billions_of_parameters_are_those_of_the_model_cards(
    name: str, all_of_them: float, but_embeddings: float
) -> None:
    config, parameters, _ = RELEASED[name]
    tables = config.text.vocab_size * config.text.hidden_size * (1 if config.text.tie_embeddings else 2)
    assert parameters / 1e9 == pytest.approx(all_of_them, abs=0.05)
    assert (parameters - tables) / 1e9 == pytest.approx(but_embeddings, abs=0.05)


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_renders_to_a_config_that_parses_to_it(name: str) -> None:
    config = RELEASED[name][0]
    hf = json.loads(json.dumps(FAMILIES[config.family].render(config)))
    assert family_for(hf) is FAMILIES[config.family]
    assert family_for(hf).parse(hf) == config


def test_configs_as_transformers_5_saves_them_mean_the_same() -> None:
    from transformers import LlamaConfig, Qwen2Config

    for saved, rendered in (
        (LlamaConfig(**FAMILIES["llama"].render(scaled(LLAMA_3_1))), scaled(LLAMA_3_1)),
        (Qwen2Config(**FAMILIES["qwen2"].render(qwen2.qwen2_7b())), qwen2.qwen2_7b()),
    ):
        hf = json.loads(saved.to_json_string())
        assert "rope_parameters" in hf
        assert family_for(hf).parse(hf) == rendered


def scaled(rope: dict[str, Any]) -> VlmConfig:
    hf = FAMILIES["llama"].render(llama.smollm2_135m())
    return FAMILIES["llama"].parse(hf | {"rope_scaling": rope})


def test_keys_that_a_config_leaves_out_are_those_of_the_class_in_transformers() -> None:
    from transformers import LlamaConfig, Qwen2Config

    for model_type, made in (("llama", LlamaConfig()), ("qwen2", Qwen2Config())):
        hf = {"model_type": model_type}
        assert family_for(hf).parse(hf) == family_for(hf).parse(json.loads(made.to_json_string()))
    # The decoder of llava-1.5-7b-hf says no more than this.
    text = FAMILIES["llama"].parse({"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}).text
    assert (text.hidden_size, text.num_layers, text.num_kv_heads, text.head_dim) == (4096, 32, 32, 128)


def test_the_width_of_a_head_is_stated_or_derived() -> None:
    hf = FAMILIES["llama"].render(llama.smollm2_135m())
    assert family_for(hf).parse(hf | {"head_dim": None}).text.head_dim == 64
    assert family_for(hf).parse(hf | {"head_dim": 32}).text.head_dim == 32


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"attention_bias": True}, "config.json: 'attention_bias' is True, expected False"),
        ("llama", {"mlp_bias": True}, "'mlp_bias' is True, expected False"),
        ("llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu', expected 'silu'"),
        ("llama", {"hidden_size": 577, "head_dim": None}, "'hidden_size' is 577, expected a multiple of"),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "'rope_type' is 'longrope', expected 'default'",
        ),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "RoPE of type 'dynamic': 'factor' is missing"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "RoPE of type 'linear': 'factor' is missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' is 0, expected a number from 1e-06"),
        ("llama", {"rope_scaling": LLAMA_3_1 | {"low_freq_factor": 4.0}}, "high_factor is 4.0, expected above"),
        ("llama", {"rope_scaling": LLAMA_3_1 | {"high_freq_factor": None}}, "'high_freq_factor' is missing"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5, expected 1"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_type' is 'yarn', expected 'default'"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "'layer_types' says 'sliding_attention' of layer 0"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(model_type: str, change: dict[str, Any], message: str) -> None:
    config = llama.smollm2_135m() if model_type == "llama" else qwen2.qwen2_0_5b()
    with pytest.raises(ConfigError, match=message):
        FAMILIES[model_type].parse(FAMILIES[model_type].render(config) | change)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_dynamic_rope_changes_nothing_up_to_the_longest_text(model_type: str) -> None:
    """As in transformers, whose frequencies stay as they are while a text is not longer than the model was made for."""
    family = FAMILIES[model_type]
    plain = family.parse(family.render(llama.smollm2_135m()))
    scaled = family.parse(family.render(plain) | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert scaled.text.rope_scaling == DynamicRope(2.0, plain.text.max_position)
    assert (plain.text.longest, scaled.text.longest) == (None, plain.text.max_position)
    assert family.parse(json.loads(json.dumps(family.render(scaled)))) == scaled
    positions = jax.numpy.arange(12).reshape(1, 1, 12).repeat(3, 0)
    turned = [text_rotation(positions, 64, 1e4, scaling=c.text.rope_scaling) for c in (plain, scaled)]
    np.testing.assert_array_equal(turned[0], turned[1])


def test_scaled_frequencies_are_those_of_transformers() -> None:
    """Angles of one position are the frequencies; Llama 3.1 keeps fast ones and divides slow ones."""
    positions = jax.numpy.ones((3, 1, 1), jax.numpy.int32)

    def frequencies(scaling: LinearRope | SmoothRope | None) -> np.ndarray:
        rotation = text_rotation(positions, 128, 5e5, scaling=scaling)
        return np.arctan2(np.asarray(rotation.sin, np.float64), np.asarray(rotation.cos))[0, 0]

    plain = 5e5 ** -(np.arange(64) / 64)
    np.testing.assert_allclose(frequencies(None), plain, rtol=1e-5)
    np.testing.assert_allclose(frequencies(LinearRope(4.0)), plain / 4, rtol=1e-5)
    smooth = frequencies(SmoothRope(8.0, 1.0, 4.0, 8192))
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(smooth[turns > 4], plain[turns > 4], rtol=1e-5)
    np.testing.assert_allclose(smooth[turns < 1], plain[turns < 1] / 8, rtol=1e-5)
    between = (turns > 1) & (turns < 4)
    mixed = (plain / 8 + (turns - 1) / 3 * (plain - plain / 8))[between]
    np.testing.assert_allclose(smooth[between], mixed, rtol=1e-5)
    assert between.any()


def test_a_model_turns_its_keys_by_the_scaled_frequencies() -> None:
    text = TextConfig(num_layers=1, qkv_bias=False, rope_scaling=LinearRope(2.0))
    model = abstract(VlmConfig(text=text, family="llama"), ModelOptions())
    assert isinstance(model, Vlm) and model.decoder.rope_scaling == LinearRope(2.0)
