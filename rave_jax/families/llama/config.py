"""Llama's config (arXiv 2302.13971, 2307.09288, 2407.21783). Checked against transformers' `LlamaForCausalLM`.

Vicuna and SmolLM2 are models of this family. Defaults of absent keys are those of transformers' `LlamaConfig`: configs
of vision-language models leave most of them out.
"""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import MAX_INT32, DynamicRope, LinearRope, RopeScaling, SmoothRope, TextConfig, VlmConfig
from rave_jax.families.hf import HfConfig, eos_ids, integer, need, number, only
from rave_jax.families.shared.text import (
    TextDefaults,
    dynamic_rope,
    render_eos,
    render_text,
    rope_section,
    rope_type,
    text_fields,
)

MODEL_TYPE, ARCHITECTURE = "llama", "LlamaForCausalLM"
DEFAULTS = TextDefaults(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
)
EOS_ID = 2
"""`eos_token_id` of a config that leaves it out."""


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key asks for what this model does not compute.
    """
    only(hf, "attention_bias", (False,))
    only(hf, "mlp_bias", (False,))
    fields = text_fields(hf, DEFAULTS)
    scaling = parse_rope(rope_section(hf), fields["max_position"])
    text = TextConfig(**fields, qkv_bias=False, rope_scaling=scaling)
    return VlmConfig(text=text, vision=None, eos_token_ids=eos_ids(hf, EOS_ID), family=MODEL_TYPE)


def parse_rope(rope: HfConfig, max_position: int, where: str = "config.json") -> RopeScaling | None:
    """How the frequencies of RoPE are scaled: not at all, all alike, the slow ones alone (Llama 3.1), or those of long
    texts.

    Args:
        rope: `rope_scaling` or `rope_parameters`.
        max_position: `max_position_embeddings`, which counts where the scaling does not say what the model was trained
            with.
        where: names the config in messages.

    Raises:
        ConfigError: another type of scaling, or a number is missing or out of range.
    """
    kind = rope_type(rope, ("default", "linear", "llama3", "dynamic"), where)
    if kind in ("default", "dynamic"):
        return dynamic_rope(rope, max_position, where)
    where = f"{where}: RoPE of type {kind!r}"
    names = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    factor, *factors = (_factor(rope, name, where) for name in names)
    if kind == "linear":
        return LinearRope(factor)
    original = integer(rope, "original_max_position_embeddings", MAX_INT32, default=max_position, where=where)
    return SmoothRope(factor, *factors, original_max_position=original)


def _factor(rope: HfConfig, name: str, where: str) -> float:
    need(rope, name, where)
    return number(rope, name, 0, 1e-6, 1e6, where)


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    text = config.text
    rope = {} if text.rope_scaling is None else {"rope_scaling": render_rope(text.rope_scaling)}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": False,
        "mlp_bias": False,
        **render_text(text),
        **rope,
        "eos_token_id": render_eos(config.eos_token_ids),
    }


def render_rope(scaling: RopeScaling) -> dict[str, Any]:
    """`rope_scaling` of an HF config."""
    if isinstance(scaling, LinearRope):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, DynamicRope):
        return {"rope_type": "dynamic", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_factor,
        "high_freq_factor": scaling.high_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
