"""SmolVLM's config. Checked against transformers' `SmolVLMForConditionalGeneration`.

Released configs leave out most of the tower, for which the defaults of the class stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rave_jax.families.config import MAX_HEADS, MAX_INT32, MAX_LAYERS, MAX_SIDE, MAX_WIDTH, VlmConfig, tower_of
from rave_jax.families.hf import HfConfig, flag, integer, needed, number, only
from rave_jax.families.shared.inner import parse_inner, render_inner
from rave_jax.families.shared.tiles import TileTowerConfig
from rave_jax.families.shared.vit import VitConfig

MODEL_TYPE, ARCHITECTURE = "smolvlm", "SmolVLMForConditionalGeneration"
TEXT_FAMILIES = ("llama",)
IMAGE_TOKEN_ID = 128257
"""Of a config that leaves it out."""
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "quick_gelu")
VISION = "config.json: vision_config"
SIZES = {
    "hidden_size": ("hidden_size", MAX_WIDTH, 1152),
    "mlp_size": ("intermediate_size", MAX_WIDTH, 3072),
    "depth": ("num_hidden_layers", MAX_LAYERS, 12),
    "num_heads": ("num_attention_heads", MAX_HEADS, 16),
    "patch_size": ("patch_size", MAX_SIDE, 32),
    "image_size": ("image_size", MAX_WIDTH, 224),
    "in_channels": ("num_channels", MAX_SIDE, 3),
}
"""Fields, their keys, the largest numbers, and the defaults."""


@dataclass(frozen=True)
class VisionConfig(VitConfig, TileTowerConfig):
    """SigLIP's tower on tiles, and the linear that makes visual tokens of what it says of a merge unit."""


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    vision = needed(hf, "vision_config")
    only(vision, "model_type", (f"{MODEL_TYPE}_vision",), VISION)
    only(vision, "hidden_act", ACTIVATIONS, VISION)
    # As in transformers: what `text_config` says of the head counts for nothing.
    text, eos = parse_inner(hf, TEXT_FAMILIES, flag(hf, "tie_word_embeddings"))
    sizes: dict[str, Any] = {
        field: integer(vision, key, most, default=default, where=VISION)
        for field, (key, most, default) in SIZES.items()
    }
    tower = VisionConfig(
        **sizes,
        kind="siglip",
        merge_size=integer(hf, "scale_factor", MAX_SIDE, default=2),
        activation=vision.get("hidden_act", ACTIVATIONS[0]),
        layer_norm_eps=number(vision, "layer_norm_eps", 1e-6, 0, 1, VISION),
        feature_layers=(sizes["depth"],),
        projector_bias=False,
        out_size=text.hidden_size,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    )
    return VlmConfig(
        text=text,
        vision=tower,
        image_token_id=integer(hf, "image_token_id", MAX_INT32, default=IMAGE_TOKEN_ID, least=0),
        eos_token_ids=eos,
        family=MODEL_TYPE,
    )


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    vision = tower_of(config, VisionConfig)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "image_token_id": config.image_token_id,
        "scale_factor": vision.merge_size,
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": render_inner(config),
        "vision_config": {
            "model_type": f"{MODEL_TYPE}_vision",
            **{key: getattr(vision, field) for field, (key, *_) in SIZES.items()},
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.layer_norm_eps,
        },
    }
