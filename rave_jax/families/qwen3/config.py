"""Qwen3's config. Checked against transformers' `Qwen3ForCausalLM`."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.hf import HfConfig, check_layer_types, eos_ids, only
from rave_jax.families.shared.text import (
    TextDefaults,
    dynamic_rope,
    render_dynamic,
    render_eos,
    render_text,
    render_window,
    rope_section,
    text_fields,
    window_fields,
)

MODEL_TYPE, ARCHITECTURE = "qwen3", "Qwen3ForCausalLM"
DEFAULTS = TextDefaults(head_dim=128, num_key_value_heads=32)


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    only(hf, "attention_bias", (False,))
    fields = text_fields(hf, DEFAULTS)
    scaling = dynamic_rope(rope_section(hf), fields["max_position"])
    text = TextConfig(**fields, **window_fields(hf), qkv_bias=False, qk_norm=True, rope_scaling=scaling)
    check_layer_types(hf, text)
    return VlmConfig(text=text, vision=None, eos_token_ids=eos_ids(hf), family=MODEL_TYPE)


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    text = config.text
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": False,
        **render_text(text),
        **render_window(text),
        **render_dynamic(text),
        "eos_token_id": render_eos(config.eos_token_ids),
    }
