"""Which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.qwen2_vl.config import VisionConfig
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.shared.grids.tensors import attention_tensors, merger_tensors, patch_tensors
from rave_jax.families.shared.tower_tensors import layer_norm, linear


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released index files."""
    return (*_vision_tensors(tower_of(config, VisionConfig)), *decoder_tensors(config.text))


def _vision_tensors(vision: VisionConfig) -> list[TensorRule]:
    D, F = vision.hidden_size, vision.mlp_size
    rules = patch_tensors(vision)
    for n in range(vision.depth):
        key = f"visual.blocks.{n}"
        rules += attention_tensors(vision, n)
        rules += linear(f"{key}.mlp.fc1", "mlp.first", F, D, n) + linear(f"{key}.mlp.fc2", "mlp.second", D, F, n)
        rules += layer_norm(f"{key}.norm1", "attention_norm", D, n) + layer_norm(f"{key}.norm2", "mlp_norm", D, n)
    return rules + layer_norm("visual.merger.ln_q", "vision.merger.norm", D) + merger_tensors(vision)
