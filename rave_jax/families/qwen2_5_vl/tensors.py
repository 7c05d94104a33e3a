"""Which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.qwen2_5_vl.config import VisionConfig
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.shared.grids.tensors import attention_tensors, merger_tensors, patch_tensors
from rave_jax.families.shared.tower_tensors import linear, rms_norm


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released index files."""
    return (*_vision_tensors(tower_of(config, VisionConfig)), *decoder_tensors(config.text))


def _vision_tensors(vision: VisionConfig) -> list[TensorRule]:
    D, F = vision.hidden_size, vision.mlp_size
    rules = patch_tensors(vision)
    for n in range(vision.depth):
        key = f"visual.blocks.{n}"
        rules += attention_tensors(vision, n)
        for name, out, into in (("gate", F, D), ("up", F, D), ("down", D, F)):
            rules += linear(f"{key}.mlp.{name}_proj", f"mlp.{name}", out, into, n)
        rules += rms_norm(f"{key}.norm1", "attention_norm", D, n) + rms_norm(f"{key}.norm2", "mlp_norm", D, n)
    return rules + rms_norm("visual.merger.ln_q", "vision.merger.norm", D) + merger_tensors(vision)
