"""Qwen3-VL's config with experts. Checked against transformers' `Qwen3VLMoeForConditionalGeneration`."""

from __future__ import annotations

import dataclasses
from typing import Any

from rave_jax.families.config import VlmConfig
from rave_jax.families.hf import HfConfig, needed
from rave_jax.families.shared.experts import parse_experts, render_experts
from rave_jax.families.shared.position_table.hf import TEXT, parse_model, render_model

MODEL_TYPE, ARCHITECTURE = "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"
EXPERTS, CHOSEN, EXPERT_SIZE, KV_HEADS = 60, 4, 1408, 16
"""Experts, experts of a token, width of an expert and kv heads of a config that does not say it."""


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    config = parse_model(hf, MODEL_TYPE, head_dim=None, absent_kv_heads=KV_HEADS)
    # transformers' router divides by the sum whatever the config says.
    text = needed(hf, "text_config")
    experts = parse_experts(text, TEXT, count=EXPERTS, chosen=CHOSEN, mlp_size=EXPERT_SIZE, normalise=True)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, experts=experts))


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    rendered, experts = render_model(config, ARCHITECTURE), config.text.experts
    if experts is not None:
        rendered["text_config"] |= render_experts(experts)
    return rendered
