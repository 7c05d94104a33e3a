"""Which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.shared.vit import VitConfig
from rave_jax.families.shared.vit_keys import vit_and_decoder


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released checkpoints."""
    return vit_and_decoder(tower_of(config, VitConfig), config.text)
