"""What small random models of these families have in common: the decoder, the chat format and the settings files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rave_jax.families.config import TowerConfig, VlmConfig, tower_of
from rave_jax.families.shared.grids.config import GridTowerConfig
from rave_jax.families.small import CHATML_TOKENS, SmallSizes, chatml, model_files, small_text

SPECIAL_TOKENS = (
    *CHATML_TOKENS,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = chatml(
    image="<|vision_start|><|image_pad|><|vision_end|>", video="<|vision_start|><|video_pad|><|vision_end|>"
)


def model_config(
    sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int], vision: TowerConfig, family: str
) -> VlmConfig:
    """The model config around a tower. Half of the rotary frequencies turn with time, a quarter each (about) with
    height and width."""
    half = sizes.hidden_size // sizes.num_heads // 2
    side = math.ceil(half / 4) if half > 2 else half // 3
    return VlmConfig(
        text=small_text(sizes, vocab_size, mrope_section=(half - 2 * side, side, side)),
        vision=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]),
        family=family,
    )


def files(
    config: VlmConfig, ids: Mapping[str, int], rendered: dict[str, Any], processors: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """What its JSON files hold, by name.

    Args:
        config: the model's.
        ids: of the special tokens.
        rendered: its HF config.
        processors: names of the processors' classes in transformers, by the keys of their file.
    """
    vision = tower_of(config, GridTowerConfig)
    unit = (vision.patch_size * vision.merge_size) ** 2
    stated = model_files(rendered, config.eos_token_ids, ids, CHAT_TEMPLATE, config.text.max_position)
    return stated | {
        "preprocessor_config.json": {
            **processors,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.merge_size,
            "min_pixels": unit,
            "max_pixels": 1024 * unit,
            "image_mean": list(vision.pixel_mean),
            "image_std": list(vision.pixel_std),
        },
    }
