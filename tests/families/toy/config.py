"""The toy's config and the tensors of its tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rave_jax.families.base import TensorRule
from rave_jax.families.config import TextConfig, TowerConfig, VlmConfig
from rave_jax.families.hf import HfConfig, eos_ids, integer, need

MODEL_TYPE, ARCHITECTURE = "toy", "ToyForConditionalGeneration"


@dataclass(frozen=True)
class ToyTower(TowerConfig):
    """One linear, `depth` blocks, one linear."""

    side: int = 8
    """Pixels along the side of a cropped picture."""

    @property
    def patch_width(self) -> int:
        return self.in_channels * self.patch_size**2


def parse(hf: HfConfig) -> VlmConfig:
    width = integer(hf, "width", 1024)
    vision = need(hf, "vision_config")
    return VlmConfig(
        TextConfig(vocab_size=integer(hf, "vocab_size", 1 << 20), hidden_size=width),
        ToyTower(
            depth=integer(vision, "depth", 8), patch_size=integer(vision, "patch_size", 64), out_size=width, side=8
        ),
        image_token_id=integer(hf, "image_token_id", 1 << 20),
        video_token_id=integer(hf, "video_token_id", 1 << 20),
        eos_token_ids=eos_ids(hf),
        family=MODEL_TYPE,
    )


def render(config: VlmConfig) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "width": config.text.hidden_size,
        "vocab_size": config.text.vocab_size,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "vision_config": {"depth": config.vision.depth, "patch_size": config.vision.patch_size},
    }


def tower_tensors(config: VlmConfig) -> list[TensorRule]:
    vision = config.vision
    D = vision.hidden_size
    return [
        TensorRule("tower.into.weight", "vision.into.weight", None, None, (D, vision.patch_width)),
        *(TensorRule(f"tower.blocks.{n}.weight", "linear.weight", n, "vision", (D, D)) for n in range(vision.depth)),
        TensorRule("tower.out.weight", "vision.out.weight", None, None, (vision.out_size, D)),
    ]
