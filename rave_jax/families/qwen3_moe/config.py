"""Qwen3-MoE's config. Checked against transformers' `Qwen3MoeForCausalLM`."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import MAX_INT32, TextConfig, VlmConfig
from rave_jax.families.hf import HfConfig, eos_ids, flag, integer, only
from rave_jax.families.shared.experts import parse_experts, render_experts
from rave_jax.families.shared.text import TextDefaults, render_eos, render_text, rope_section, rope_type, text_fields

MODEL_TYPE, ARCHITECTURE = "qwen3_moe", "Qwen3MoeForCausalLM"
DEFAULTS = TextDefaults(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=4,
)
EXPERTS = 128
"""Experts of a config that does not say it."""


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key asks for what this model does not compute.
    """
    where = "config.json"
    only(hf, "attention_bias", (False,), where)
    rope_type(rope_section(hf, where), where=where)
    windowed = flag(hf, "use_sliding_window", where)
    window = integer(hf, "sliding_window", MAX_INT32, default=4096, where=where)
    text = TextConfig(
        **text_fields(hf, DEFAULTS, where),
        qkv_bias=False,
        qk_norm=True,
        # As in transformers: in every layer, whatever `max_window_layers` says.
        sliding_window=window if windowed and hf.get("sliding_window", 4096) is not None else None,
        experts=parse_experts(hf, where, count=EXPERTS),
    )
    return VlmConfig(text=text, eos_token_ids=eos_ids(hf), family=MODEL_TYPE)


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    text = config.text
    experts = {} if text.experts is None else render_experts(text.experts)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": False,
        **render_text(text),
        **experts,
        "use_sliding_window": text.sliding_window is not None,
        "sliding_window": text.sliding_window,
        "eos_token_id": render_eos(config.eos_token_ids),
    }
