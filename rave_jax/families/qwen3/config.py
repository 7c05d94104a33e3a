"""Qwen3's config. Checked against transformers' `Qwen3ForCausalLM`."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import MAX_HEADS, MAX_INT32, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, TextConfig, VlmConfig
from rave_jax.families.hf import (
    HfConfig,
    check_layer_types,
    eos_ids,
    flag,
    integer,
    norm_eps,
    only,
    rope_theta,
    section,
)

MODEL_TYPE, ARCHITECTURE = "qwen3", "Qwen3ForCausalLM"


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    only(hf, "hidden_act", ("silu",))
    only(hf, "attention_bias", (False,))
    rope = section(hf, "rope_scaling") or section(hf, "rope_parameters")
    only({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", ("default",))
    windowed = flag(hf, "use_sliding_window")
    window = integer(hf, "sliding_window", MAX_INT32, default=4096)
    first = integer(hf, "max_window_layers", MAX_INT32, default=28, least=0)
    text = TextConfig(
        vocab_size=integer(hf, "vocab_size", MAX_VOCAB),
        hidden_size=integer(hf, "hidden_size", MAX_WIDTH),
        num_layers=integer(hf, "num_hidden_layers", MAX_LAYERS),
        num_heads=integer(hf, "num_attention_heads", MAX_HEADS),
        num_kv_heads=integer(hf, "num_key_value_heads", MAX_HEADS),
        head_dim=integer(hf, "head_dim", MAX_WIDTH, default=128),
        mlp_size=integer(hf, "intermediate_size", MAX_WIDTH),
        rms_norm_eps=norm_eps(hf, 1e-6),
        rope_theta=rope_theta(hf, rope, 1e4),
        mrope_section=(),
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=flag(hf, "tie_word_embeddings"),
        sliding_window=window if windowed and hf.get("sliding_window", 4096) is not None else None,
        window_from=first if windowed else 0,
        max_position=integer(hf, "max_position_embeddings", MAX_INT32, default=32768),
    )
    check_layer_types(hf, text)
    return VlmConfig(text=text, vision=None, eos_token_ids=eos_ids(hf), family=MODEL_TYPE)


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    text = config.text
    windowed = text.sliding_window is not None
    eos = config.eos_token_ids
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        "attention_bias": False,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.mlp_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "max_position_embeddings": text.max_position,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_embeddings,
        "use_sliding_window": windowed,
        "sliding_window": text.sliding_window,
        "max_window_layers": text.window_from if windowed else text.num_layers,
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
    }
