"""Qwen3-VL's config. Checked against transformers' `Qwen3VLForConditionalGeneration`."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import VlmConfig
from rave_jax.families.hf import HfConfig
from rave_jax.families.shared.position_table.hf import parse_model, render_model

MODEL_TYPE, ARCHITECTURE = "qwen3_vl", "Qwen3VLForConditionalGeneration"


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    return parse_model(hf, MODEL_TYPE)


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    return render_model(config, ARCHITECTURE)
