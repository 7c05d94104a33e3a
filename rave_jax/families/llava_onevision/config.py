"""LLaVA-OneVision's config. Checked against transformers' `LlavaOnevisionForConditionalGeneration`.

Defaults of absent keys are those of transformers' `LlavaOnevisionConfig`, except in `vision_config`, whose sizes have
to be there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rave_jax.config import ConfigError, require
from rave_jax.families.config import MAX_INT32, MAX_WIDTH, VlmConfig, tower_of
from rave_jax.families.hf import HfConfig, integer, needed, only
from rave_jax.families.shared.inner import parse_inner, render_inner
from rave_jax.families.shared.vit import (
    VitConfig,
    VitKind,
    feature_layers,
    parse_vit,
    render_feature_layers,
    render_vit,
)

MODEL_TYPE, ARCHITECTURE = "llava_onevision", "LlavaOnevisionForConditionalGeneration"
TEXT_FAMILIES = ("qwen2", "llama")
IMAGE_TOKEN_ID, VIDEO_TOKEN_ID = 151646, 151647
"""Ids of `<image>` and `<video>` in the released models, which a config may leave out."""
SIDES = (384, 768, 1152, 1536, 1920, 2304)
PINPOINTS = tuple((height, width) for height in SIDES for width in SIDES)
"""`image_grid_pinpoints` of a config that leaves them out."""
MOST_TILES = 9
ASPECT = re.compile(r"anyres_max_([1-9]\d{0,3})")
"""`vision_aspect_ratio`: what a picture's tiles are made smaller to, counted in tiles."""


@dataclass(frozen=True)
class AnyresConfig(VitConfig):
    """A SigLIP tower, and the sizes that a picture may be tiled in."""

    kind: VitKind = "siglip"
    """siglip: no class token, no norm before the blocks, a bias in the patch projection."""
    activation: str = "gelu_pytorch_tanh"
    """Between the two linears of each mlp."""
    layer_norm_eps: float = 1e-6
    """Added to the variance in every LayerNorm."""
    pinpoints: tuple[tuple[int, int], ...] = ((56, 56), (56, 112), (112, 56), (112, 112))
    """(height, width) in pixels of what a picture is fitted into, whole tiles of image_size."""
    most_tiles: int = MOST_TILES
    """Visual tokens of a tiled picture, counted in tiles, above which they are interpolated to fewer."""

    @property
    def class_looks(self) -> bool:
        """Units of tiles are interpolated, which attention to patches cannot be."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind == "siglip", "kind", self.kind, "siglip")
        side = self.image_size
        whole = self.pinpoints and all(
            len(one) == 2 and min(one) >= side and max(one) <= MAX_WIDTH and one[0] % side == one[1] % side == 0
            for one in self.pinpoints
        )
        require(bool(whole), "pinpoints", self.pinpoints, f"pairs of multiples of image_size {side}")
        require(1 <= self.most_tiles <= 9999, "most_tiles", self.most_tiles, "a number from 1 to 9,999")

    @property
    def mixed(self) -> int:
        """Visual tokens are interpolated between four units."""
        return 4

    @property
    def spread(self) -> int:
        """All tiles, and the picture as a whole, may become little more visual tokens than one tile has units."""
        return 1 + max(height * width for height, width in self.pinpoints) // self.image_size**2


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    vision = needed(hf, "vision_config")
    only(hf, "projector_hidden_act", ("gelu",))
    only(hf, "multimodal_projector_bias", (True, False))
    only(hf, "vision_feature_select_strategy", ("full",))
    only(hf, "use_image_newline_parameter", (True,))
    only(vision, "model_type", ("siglip_vision_model",), "config.json: vision_config")
    text, eos = parse_inner(hf, TEXT_FAMILIES)
    fields = parse_vit({"model_type": "siglip_vision_model", **vision}, "config.json: vision_config")
    tower = AnyresConfig(
        **fields,
        out_size=text.hidden_size,
        feature_layers=feature_layers(hf.get("vision_feature_layer", -1), fields["depth"]),
        projector_bias=hf.get("multimodal_projector_bias", True),
        pinpoints=_pinpoints(hf.get("image_grid_pinpoints"), fields["image_size"]),
        most_tiles=most_tiles(hf.get("vision_aspect_ratio", f"anyres_max_{MOST_TILES}"), "config.json"),
    )
    return VlmConfig(
        text=text,
        vision=tower,
        image_token_id=_token_id(hf, "image", IMAGE_TOKEN_ID),
        video_token_id=_token_id(hf, "video", VIDEO_TOKEN_ID),
        eos_token_ids=eos,
        family=MODEL_TYPE,
    )


def most_tiles(stated: Any, where: str) -> int:
    """The number in `vision_aspect_ratio`.

    Raises:
        ConfigError: it is something else than `anyres_max_N`.
    """
    found = ASPECT.fullmatch(stated) if isinstance(stated, str) else None
    if found is None:
        raise ConfigError(f"{where}: 'vision_aspect_ratio' is {stated!r}, expected 'anyres_max_9' or another number")
    return int(found[1])


def _pinpoints(stated: Any, side: int) -> tuple[tuple[int, int], ...]:
    if stated is None:
        return PINPOINTS
    pairs = stated if isinstance(stated, list) else []
    good = [
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n > 0 and n % side == 0 for n in pair)
        for pair in pairs
    ]
    if not pairs or not all(good):
        raise ConfigError(
            f"config.json: 'image_grid_pinpoints' is {stated!s:.60}, expected a list of [height, width], each a "
            f"multiple of the tower's image_size {side}"
        )
    return tuple((height, width) for height, width in pairs)


def _token_id(hf: HfConfig, kind: str, default: int) -> int:
    key = f"{kind}_token_id" if hf.get(f"{kind}_token_id") is not None else f"{kind}_token_index"
    return integer(hf, key, MAX_INT32, default=default, least=0)


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    tower = tower_of(config, AnyresConfig)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "image_token_index": config.image_token_id,
        "video_token_index": config.video_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": tower.projector_bias,
        "vision_feature_layer": render_feature_layers(tower),
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": f"anyres_max_{tower.most_tiles}",
        "image_grid_pinpoints": [list(pair) for pair in tower.pinpoints],
        "use_image_newline_parameter": True,
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": render_inner(config),
        "vision_config": render_vit(tower),
    }
