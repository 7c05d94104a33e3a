"""Qwen3's config. Checked against transformers' `Qwen3ForCausalLM`."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.hf import HfConfig, check_layer_types, eos_ids, only
from rave_jax.families.text import (
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
    return VlmConfig(text=parse_text(hf), vision=None, eos_token_ids=eos_ids(hf), family=MODEL_TYPE)


def parse_text(hf: HfConfig, where: str = "config.json", tied: bool | None = None) -> TextConfig:
    """The decoder of an HF config, which may be a `text_config` inside another.

    Args:
        hf: the config.
        where: names it in messages.
        tied: is the embedding table the output head? None: what this config says of it.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    only(hf, "attention_bias", (False,), where)
    fields = text_fields(hf, DEFAULTS, where, tied)
    scaling = dynamic_rope(rope_section(hf, where), fields["max_position"], where)
    text = TextConfig(**fields, **window_fields(hf, where), qkv_bias=False, qk_norm=True, rope_scaling=scaling)
    check_layer_types(hf, text, where)
    return text


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    eos = render_eos(config.eos_token_ids)
    return {"architectures": [ARCHITECTURE], **render_decoder(config.text), "eos_token_id": eos}


def render_decoder(text: TextConfig) -> dict[str, Any]:
    """The HF config of the decoder alone, as it stands in a `text_config`."""
    plain = {"model_type": MODEL_TYPE, "attention_bias": False}
    return {**plain, **render_text(text), **render_window(text), **render_dynamic(text)}
