"""Qwen3.5's text config. Checked against transformers' `Qwen3_5ForCausalLM`."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import VlmConfig
from rave_jax.families.hf import HfConfig, eos_ids, flag
from rave_jax.families.shared.gated_delta import parse_text, render_text

MODEL_TYPE, ARCHITECTURE = "qwen3_5_text", "Qwen3_5ForCausalLM"


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    text = parse_text(hf, flag(hf, "tie_word_embeddings"))
    return VlmConfig(text=text, vision=None, eos_token_ids=eos_ids(hf), family=MODEL_TYPE)


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    eos = config.eos_token_ids
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **render_text(config.text),
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
    }
