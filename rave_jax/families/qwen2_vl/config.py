"""Qwen2-VL's config. Checked against transformers' `Qwen2VLForConditionalGeneration`.

Released configs state all of the tower or, from transformers 4.46 on, only what differs from the class's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rave_jax.config import ConfigError, require
from rave_jax.families.config import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_SIDE,
    MAX_WIDTH,
    ROPE_THETA,
    VlmConfig,
    tower_of,
)
from rave_jax.families.hf import HfConfig, integer, needed, only, rope_theta, section
from rave_jax.families.shared.grids.config import GridTowerConfig
from rave_jax.families.shared.grids.hf import VISION, parse_model, render_model

MODEL_TYPE, ARCHITECTURE = "qwen2_vl", "Qwen2VLForConditionalGeneration"
REPEATED = {"in_chans": "in_channels", "spatial_patch_size": "patch_size"}
"""Keys of the released configs that transformers does not read, and the keys that it reads instead."""


@dataclass(frozen=True)
class VisionConfig(GridTowerConfig):
    """The vision tower and the merger after it."""

    rope_theta: float = 1e4
    """Base of the rotary frequencies of rows and columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.mlp_size % self.hidden_size == 0
        require(whole, "mlp_size", self.mlp_size, f"a multiple of hidden_size {self.hidden_size}")
        low, high = ROPE_THETA
        require(low <= self.rope_theta <= high, "rope_theta", self.rope_theta, f"a number from {low:g} to {high:g}")


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    return parse_model(hf, _parse_vision(needed(hf, "vision_config")), MODEL_TYPE)


def _parse_vision(vision: HfConfig) -> VisionConfig:
    only(vision, "hidden_act", ("quick_gelu",), VISION)
    rope = section(vision, "rope_parameters", VISION)
    only(rope, "rope_type", ("axial", "default"), VISION)
    width = integer(vision, "embed_dim", MAX_WIDTH, default=1280, where=VISION)
    tower = VisionConfig(
        depth=integer(vision, "depth", MAX_LAYERS, default=32, where=VISION),
        hidden_size=width,
        num_heads=integer(vision, "num_heads", MAX_HEADS, default=16, where=VISION),
        mlp_size=width * integer(vision, "mlp_ratio", MAX_SIDE, default=4, where=VISION),
        patch_size=integer(vision, "patch_size", MAX_SIDE, default=14, where=VISION),
        in_channels=integer(vision, "in_channels", MAX_SIDE, default=3, where=VISION),
        temporal_patch_size=integer(vision, "temporal_patch_size", MAX_SIDE, default=2, where=VISION),
        merge_size=integer(vision, "spatial_merge_size", MAX_SIDE, default=2, where=VISION),
        out_size=integer(vision, "hidden_size", MAX_WIDTH, default=3584, where=VISION),
        rope_theta=rope_theta({}, rope, 1e4, VISION),
    )
    for key, read in REPEATED.items():
        wanted = getattr(tower, read)
        if vision.get(key, wanted) != wanted:
            raise ConfigError(f"{VISION}: {key!r} is {vision[key]!r}, expected {wanted} as {read!r} has it")
    return tower


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config, flat as the released ones, which transformers 4 and 5 read."""
    vision = tower_of(config, VisionConfig)
    stated: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "hidden_act": "quick_gelu",
        "depth": vision.depth,
        "embed_dim": vision.hidden_size,
        "hidden_size": vision.out_size,
        "num_heads": vision.num_heads,
        "mlp_ratio": vision.mlp_size // vision.hidden_size,
        "in_channels": vision.in_channels,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    if vision.rope_theta != 1e4:
        stated["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
    return render_model(config, ARCHITECTURE, stated)
