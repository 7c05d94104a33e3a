"""Which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.decoder import decoder_tensors
from rave_jax.families.vit import VitConfig, projector_tensors, vit_tensors

VISION, PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
PARTS = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
BARE = {f"vision_tower.{part}.": f"{VISION}{part}." for part in PARTS}
STYLES = (
    # As transformers 5 has its modules, and as it saves them; and as some releases of 4 saved them.
    (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        (f"model.{PROJECTOR}", PROJECTOR),
        *((f"model.{other}", canonical) for other, canonical in BARE.items()),
    ),
    tuple(BARE.items()),
    (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        (f"model.{PROJECTOR}", PROJECTOR),
        (f"model.{VISION}", VISION),
    ),
)
"""Styles of keys beside the released one."""


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released checkpoints."""
    tower = tower_of(config, VitConfig)
    decoder = [rule._replace(hf_key=f"language_model.{rule.hf_key}") for rule in decoder_tensors(config.text)]
    return (*vit_tensors(tower, VISION), *projector_tensors(tower, PROJECTOR), *decoder)
