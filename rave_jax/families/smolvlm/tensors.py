"""Which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.shared.tower_tensors import weight
from rave_jax.families.shared.vit import vit_tensors
from rave_jax.families.smolvlm.config import VisionConfig

CONNECTOR = "model.connector.modality_projection.proj"


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released checkpoints."""
    vision = tower_of(config, VisionConfig)
    joined = vision.hidden_size * vision.merge_unit
    return (
        *vit_tensors(vision, "model.vision_model."),
        *weight(CONNECTOR, "vision.projector", vision.out_size, joined),
        *(rule._replace(hf_key=_renamed(rule.hf_key)) for rule in decoder_tensors(config.text)),
    )


def _renamed(key: str) -> str:
    return f"model.text_model.{key.removeprefix('model.')}" if key.startswith("model.") else key
