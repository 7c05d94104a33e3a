"""Which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.internvl.config import VisionConfig
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.shared.tower_tensors import layer_norm, linear, plain, rms_norm, weight

PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
"""Keys as transformers 5 names its modules, and as released."""


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released checkpoints."""
    vision = tower_of(config, VisionConfig)
    decoder = [rule._replace(hf_key=f"language_model.{rule.hf_key}") for rule in decoder_tensors(config.text)]
    return (*_vision_tensors(vision), *_projector_tensors(vision), *decoder)


def _vision_tensors(vision: VisionConfig) -> list[TensorRule]:
    D, F, p = vision.hidden_size, vision.mlp_size, vision.patch_size
    embeddings, norm = "vision_tower.embeddings", {"layer_norm": layer_norm, "rms_norm": rms_norm}[vision.norm]
    rules = [
        plain(f"{embeddings}.cls_token", "vision.class_token", (1, 1, D)),
        plain(f"{embeddings}.patch_embeddings.projection.weight", "vision.patch.weight", (D, vision.in_channels, p, p)),
        plain(f"{embeddings}.patch_embeddings.projection.bias", "vision.patch.bias", (D,)),
    ]
    if vision.positions:
        rules.append(plain(f"{embeddings}.position_embeddings", "vision.position", (1, vision.side**2 + 1, D)))
    for n in range(vision.depth):
        key = f"vision_tower.encoder.layer.{n}"
        for name in ("query", "key", "value"):
            project = linear if vision.qkv_bias else weight
            rules += project(f"{key}.attention.{name[0]}_proj", f"attention.{name}", D, D, n)
        if vision.qk_norm:
            rules += [
                rule
                for name in ("query", "key")
                for rule in rms_norm(f"{key}.attention.{name[0]}_norm", f"attention.{name}_norm", D, n)
            ]
        rules += linear(f"{key}.attention.projection_layer", "attention.output", D, D, n)
        rules += linear(f"{key}.mlp.fc1", "mlp.first", F, D, n) + linear(f"{key}.mlp.fc2", "mlp.second", D, F, n)
        rules += norm(f"{key}.layernorm_before", "attention_norm", D, n)
        rules += norm(f"{key}.layernorm_after", "mlp_norm", D, n)
        rules += [plain(f"{key}.lambda_1", "attention_scale", (D,), n), plain(f"{key}.lambda_2", "mlp_scale", (D,), n)]
    return rules + (layer_norm("vision_tower.layernorm", "vision.norm", D) if vision.last_norm else [])


def _projector_tensors(vision: VisionConfig) -> list[TensorRule]:
    joined, key = vision.hidden_size * vision.merge_unit, "multi_modal_projector"
    return [
        *layer_norm(f"{key}.layer_norm", "vision.projector.norm", joined),
        *linear(f"{key}.linear_1", "vision.projector.first", vision.out_size, joined),
        *linear(f"{key}.linear_2", "vision.projector.second", vision.out_size, vision.out_size),
    ]
