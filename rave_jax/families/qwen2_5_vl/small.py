"""What makes a small random model of this family a whole HF directory: its config, chat format and settings files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen2_5_vl.config import MODEL_TYPE, VisionConfig, render, tower_of
from rave_jax.families.small import CHATML_TOKENS, SmallModels, SmallSizes, chatml, model_files, small_text

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


def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
    """The model config. The last block of the tower attends over the whole frame; half of the rotary frequencies
    turn with time, a quarter each (about) with height and width."""
    half = sizes.hidden_size // sizes.num_heads // 2
    side = math.ceil(half / 4) if half > 2 else half // 3
    text = small_text(sizes, vocab_size, mrope_section=(half - 2 * side, side, side))
    vision = VisionConfig(
        depth=sizes.vision_layers,
        hidden_size=sizes.vision_hidden_size,
        num_heads=sizes.vision_heads,
        mlp_size=sizes.vision_mlp_size,
        patch_size=sizes.patch_size,
        merge_size=sizes.merge_size,
        window_size=sizes.window_size,
        full_attention_blocks=(sizes.vision_layers - 1,),
        out_size=sizes.hidden_size,
    )
    return VlmConfig(
        text=text,
        vision=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]),
        family=MODEL_TYPE,
    )


def files(config: VlmConfig, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What its JSON files hold, by name."""
    vision = tower_of(config)
    unit = (vision.patch_size * vision.merge_size) ** 2
    stated = model_files(render(config), config.eos_token_ids, ids, CHAT_TEMPLATE, config.text.max_position)
    return stated | {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.merge_size,
            "min_pixels": unit,
            "max_pixels": 1024 * unit,
            "image_mean": list(vision.pixel_mean),
            "image_std": list(vision.pixel_std),
        },
    }


SMALL = SmallModels(SPECIAL_TOKENS, config, files)
