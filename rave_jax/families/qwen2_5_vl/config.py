"""Qwen2.5-VL's config. Checked against transformers' `Qwen2_5_VLForConditionalGeneration`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rave_jax.config import require
from rave_jax.families.config import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_SIDE,
    MAX_WIDTH,
    VlmConfig,
    check_norm_and_rope,
    tower_of,
    within,
)
from rave_jax.families.hf import (
    HfConfig,
    integer,
    integers,
    needed,
    number,
    only,
    rope_theta,
    section,
)
from rave_jax.families.shared.grids.config import GridTowerConfig
from rave_jax.families.shared.grids.hf import VISION, parse_model, render_model

MODEL_TYPE, ARCHITECTURE = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"


@dataclass(frozen=True)
class VisionConfig(GridTowerConfig):
    """The vision tower and the merger after it."""

    window_size: int = 112
    """Side of an attention window in pixels."""
    full_attention_blocks: tuple[int, ...] = (1,)
    """Blocks that attend over the whole frame; the others stay inside windows."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm of the tower."""
    rope_theta: float = 1e4
    """Base of the rotary frequencies of rows and columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, {"window_size": MAX_WIDTH})
        unit = self.unit_size
        require(self.window_size >= unit, "window_size", self.window_size, f"at least one merge unit of {unit} pixels")
        known = all(0 <= n < self.depth for n in self.full_attention_blocks)
        require(known, "full_attention_blocks", self.full_attention_blocks, f"numbers from 0 to {self.depth - 1}")
        check_norm_and_rope(self)

    @property
    def window_units(self) -> int:
        """Merge units along the side of a window: as many whole ones as fit in window_size."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """The most patches a window can hold; a row's number of patches is a multiple of it."""
        return (self.window_units * self.merge_size) ** 2


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    vision = needed(hf, "vision_config")
    per_second = number(vision, "tokens_per_second", 4, 1e-6, 1e6, VISION)
    return parse_model(hf, _parse_vision(vision), MODEL_TYPE, per_second)


def _parse_vision(vision: HfConfig) -> VisionConfig:
    where = VISION
    only(vision, "hidden_act", ("silu",), where)
    rope = section(vision, "rope_parameters", where)
    only(rope, "rope_type", ("axial", "default"), where)
    return VisionConfig(
        depth=integer(vision, "depth", MAX_LAYERS, where=where),
        hidden_size=integer(vision, "hidden_size", MAX_WIDTH, where=where),
        num_heads=integer(vision, "num_heads", MAX_HEADS, where=where),
        mlp_size=integer(vision, "intermediate_size", MAX_WIDTH, where=where),
        patch_size=integer(vision, "patch_size", MAX_SIDE, default=14, where=where),
        temporal_patch_size=integer(vision, "temporal_patch_size", MAX_SIDE, default=2, where=where),
        merge_size=integer(vision, "spatial_merge_size", MAX_SIDE, default=2, where=where),
        window_size=integer(vision, "window_size", MAX_WIDTH, default=112, where=where),
        full_attention_blocks=integers(vision, "fullatt_block_indexes", (7, 15, 23, 31), where),
        in_channels=integer(vision, "in_channels", MAX_SIDE, default=3, where=where),
        out_size=integer(vision, "out_hidden_size", MAX_WIDTH, where=where),
        rope_theta=rope_theta({}, rope, 1e4, where),
    )


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config, flat as the released ones, which transformers 4 and 5 read."""
    vision = tower_of(config, VisionConfig)
    stated = {
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "num_heads": vision.num_heads,
        "intermediate_size": vision.mlp_size,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "spatial_merge_size": vision.merge_size,
        "window_size": vision.window_size,
        "fullatt_block_indexes": list(vision.full_attention_blocks),
        "in_channels": vision.in_channels,
        "out_hidden_size": vision.out_size,
        "tokens_per_second": _whole(config.tokens_per_second),
    }
    return render_model(config, ARCHITECTURE, stated)


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value
