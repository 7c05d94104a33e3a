"""InternVL's config. Checked against transformers' `InternVLForConditionalGeneration`.

It is that of the `-hf` checkpoints. The original ones (`internvl_chat`) have other keys and their own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rave_jax.config import ConfigError, require
from rave_jax.families.config import MAX_HEADS, MAX_INT32, MAX_LAYERS, MAX_SIDE, MAX_WIDTH, VlmConfig, tower_of
from rave_jax.families.hf import HfConfig, flag, integer, needed, number, only
from rave_jax.families.shared.inner import parse_inner, render_inner
from rave_jax.families.shared.tiles import TileTowerConfig

MODEL_TYPE, ARCHITECTURE = "internvl", "InternVLForConditionalGeneration"
TEXT_FAMILIES = ("qwen2", "qwen3", "llama")
IMAGE_TOKEN_ID = 151667
"""Id of `<IMG_CONTEXT>` in the released models, which a config may leave out."""
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
NORMS = ("layer_norm", "rms_norm")
VISION = "config.json: vision_config"


@dataclass(frozen=True)
class VisionConfig(TileTowerConfig):
    """The vision tower, InternViT, and the projector after it."""

    norm: str = "layer_norm"
    """Kind of the norms of a block: layer_norm or rms_norm."""
    norm_eps: float = 1e-6
    """Added to the variance or the mean square in these norms."""
    qkv_bias: bool = False
    """Do the query, key and value projections have a bias?"""
    qk_norm: bool = False
    """Is an RMSNorm over all heads applied to queries and keys?"""
    positions: bool = True
    """Has every place of a tile a learned embedding?"""
    layer_scale: float = 0.1
    """What the learned factors of a block's two updates start with."""
    last_norm: bool = False
    """Is there a LayerNorm behind the last block?"""
    activation: str = "gelu"
    """Between the two linears of each mlp."""
    projector_activation: str = "gelu"
    """Between the two linears of the projector."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.norm in NORMS, "norm", self.norm, " or ".join(NORMS))
        require(0 <= self.norm_eps <= 1, "norm_eps", self.norm_eps, "a number from 0 to 1")
        require(abs(self.layer_scale) <= 1e6, "layer_scale", self.layer_scale, "a number of at most 1e6")
        for name in ("activation", "projector_activation"):
            given = getattr(self, name)
            require(given in ACTIVATIONS, name, given, " or ".join(ACTIVATIONS))


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    vision = needed(hf, "vision_config")
    only(hf, "vision_feature_layer", (-1,))
    only(hf, "vision_feature_select_strategy", ("default",))
    only(hf, "projector_hidden_act", ACTIVATIONS)
    # What `text_config` says of the head counts where the whole config says nothing. Configs of the released models say
    # nothing at all, and their heads are their own.
    stated = hf.get("tie_word_embeddings") is not None
    text, eos = parse_inner(hf, TEXT_FAMILIES, flag(hf, "tie_word_embeddings") if stated else None)
    ratio = number(hf, "downsample_ratio", 0.5, 1 / MAX_SIDE, 1)
    merge = round(1 / ratio)
    if merge * ratio != 1:
        raise ConfigError(f"config.json: 'downsample_ratio' is {ratio!r}, expected 1 divided by a whole number")
    tower = VisionConfig(
        **_parse_vision(vision),
        merge_size=merge,
        out_size=text.hidden_size,
        projector_activation=hf.get("projector_hidden_act", ACTIVATIONS[0]),
    )
    seen = hf.get("image_seq_length", tower.token_side**2)
    if seen != tower.token_side**2:
        raise ConfigError(
            f"config.json: 'image_seq_length' is {seen!r}, expected {tower.token_side**2}: the visual tokens of a tile"
        )
    return VlmConfig(
        text=text,
        vision=tower,
        image_token_id=integer(hf, "image_token_id", MAX_INT32, default=IMAGE_TOKEN_ID, least=0),
        eos_token_ids=eos,
        family=MODEL_TYPE,
    )


def _parse_vision(vision: HfConfig) -> dict[str, Any]:
    only(vision, "hidden_act", ACTIVATIONS, VISION)
    only(vision, "norm_type", NORMS, VISION)
    only(vision, "use_mask_token", (False,), VISION)
    width = integer(vision, "hidden_size", MAX_WIDTH, default=1024, where=VISION)
    return {
        "depth": integer(vision, "num_hidden_layers", MAX_LAYERS, default=24, where=VISION),
        "hidden_size": width,
        "num_heads": integer(vision, "num_attention_heads", MAX_HEADS, default=16, where=VISION),
        "mlp_size": integer(vision, "intermediate_size", MAX_WIDTH, default=4096, where=VISION),
        "patch_size": _side(vision, "patch_size", 14),
        "image_size": _side(vision, "image_size", 448),
        "in_channels": integer(vision, "num_channels", MAX_SIDE, default=3, where=VISION),
        "norm": vision.get("norm_type", NORMS[0]),
        "norm_eps": number(vision, "layer_norm_eps", 1e-6, 0, 1, VISION),
        "qkv_bias": flag(vision, "attention_bias", VISION),
        "qk_norm": flag(vision, "use_qk_norm", VISION),
        "positions": _true(vision, "use_absolute_position_embeddings"),
        "layer_scale": number(vision, "layer_scale_init_value", 0.1, -1e6, 1e6, VISION),
        "last_norm": not _true(vision, "use_mean_pooling"),
        "activation": vision.get("hidden_act", ACTIVATIONS[0]),
    }


def _true(vision: HfConfig, key: str) -> bool:
    """A flag that is true where the config states none."""
    return flag(vision, key, VISION) if vision.get(key) is not None else True


def _side(vision: HfConfig, key: str, default: int) -> int:
    """The side of a square, which a config may state twice, as height and width."""
    value = vision.get(key)
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise ConfigError(f"{VISION}: {key!r} is {value!r}, expected a number, or the same one twice")
        value = value[0]
    return integer({key: value}, key, MAX_WIDTH, default=default, where=VISION)


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    vision = tower_of(config, VisionConfig)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "image_token_id": config.image_token_id,
        "image_seq_length": vision.token_side**2,
        "downsample_ratio": 1 / vision.merge_size,
        "projector_hidden_act": vision.projector_activation,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": render_inner(config),
        "vision_config": {
            "model_type": f"{MODEL_TYPE}_vision",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.mlp_size,
            "patch_size": [vision.patch_size] * 2,
            "image_size": [vision.image_size] * 2,
            "num_channels": vision.in_channels,
            "norm_type": vision.norm,
            "layer_norm_eps": vision.norm_eps,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_norm,
            "use_absolute_position_embeddings": vision.positions,
            "layer_scale_init_value": vision.layer_scale,
            "use_mean_pooling": not vision.last_norm,
            "use_mask_token": False,
            "hidden_act": vision.activation,
        },
    }
