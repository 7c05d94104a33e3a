"""Qwen3, text only (arXiv 2505.09388): q/k norm, no qkv bias, 1-D RoPE. Checked against `Qwen3ForCausalLM`."""

from __future__ import annotations

from typing import Any

from rave_jax.models.config import TextConfig, VlmConfig
from rave_jax.models.families.base import (
    Family,
    HfConfig,
    TensorRule,
    check_layer_types,
    decoder_tensors,
    eos_ids,
    need,
    only,
)


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    only(hf, "hidden_act", ("silu",))
    only(hf, "attention_bias", (False,))
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    only({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", ("default",))
    windowed = bool(hf.get("use_sliding_window"))
    text = TextConfig(
        vocab_size=need(hf, "vocab_size"),
        hidden_size=need(hf, "hidden_size"),
        num_layers=need(hf, "num_hidden_layers"),
        num_heads=need(hf, "num_attention_heads"),
        num_kv_heads=need(hf, "num_key_value_heads"),
        head_dim=hf.get("head_dim", 128),
        mlp_size=need(hf, "intermediate_size"),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 1e4))),
        mrope_section=(),
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        sliding_window=hf.get("sliding_window", 4096) if windowed else None,
        window_from=hf.get("max_window_layers", 28) if windowed else 0,
        max_position=hf.get("max_position_embeddings", 32768),
    )
    check_layer_types(hf, text)
    return VlmConfig(text=text, vision=None, eos_token_ids=eos_ids(hf), family=FAMILY.model_type)


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    text = config.text
    windowed = text.sliding_window is not None
    eos = config.eos_token_ids
    return {
        "architectures": [FAMILY.architecture],
        "model_type": FAMILY.model_type,
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


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor of a checkpoint."""
    return tuple(decoder_tensors(config))


FAMILY = Family(model_type="qwen3", architecture="Qwen3ForCausalLM", parse=parse, render=render, tensors=tensors)
