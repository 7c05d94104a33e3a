"""Which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.llava_onevision.config import AnyresConfig
from rave_jax.families.shared.vit_keys import NEWLINE, vit_and_decoder


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released checkpoints."""
    tower = tower_of(config, AnyresConfig)
    newline = TensorRule(NEWLINE, "vision.newline", None, None, (tower.out_size,))
    return (newline, *vit_and_decoder(tower, config.text))
