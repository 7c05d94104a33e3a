"""What makes a small random model of this family a whole HF directory: its config, chat format and settings files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.llava_onevision.config import MODEL_TYPE, AnyresConfig, render
from rave_jax.families.small import CHATML_TOKENS, SmallModels, SmallSizes, chatml, model_files, small_text

SPECIAL_TOKENS = (*CHATML_TOKENS, "<image>", "<video>")
SIDE = 3
"""Patches along the side of a tile."""
TEMPLATE = chatml(image="<image>\n", video="<video>\n")


def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
    """The model config: tiles of 3 x 3 patches, up to 3 x 3 of them, interpolated to the tokens of 2."""
    tile = SIDE * sizes.patch_size
    vision = AnyresConfig(
        depth=sizes.vision_layers,
        hidden_size=sizes.vision_hidden_size,
        num_heads=sizes.vision_heads,
        mlp_size=sizes.vision_mlp_size,
        patch_size=sizes.patch_size,
        image_size=tile,
        feature_layers=(sizes.vision_layers,),
        out_size=sizes.hidden_size,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
        pinpoints=tuple((tile * rows, tile * cols) for rows in (1, 2, 3) for cols in (1, 2, 3)),
        most_tiles=2,
    )
    return VlmConfig(
        text=small_text(sizes, vocab_size, family="qwen2"),
        vision=vision,
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]),
        family=MODEL_TYPE,
    )


def files(config: VlmConfig, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What its JSON files hold, by name."""
    vision = tower_of(config, AnyresConfig)
    shared = {
        "processor_class": "LlavaOnevisionProcessor",
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 3,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
    pinpoints = {"image_grid_pinpoints": [list(pair) for pair in vision.pinpoints]}
    return model_files(render(config), config.eos_token_ids, ids, TEMPLATE, config.text.max_position) | {
        "preprocessor_config.json": {"image_processor_type": "LlavaOnevisionImageProcessor", **shared, **pinpoints},
        "video_preprocessor_config.json": {"video_processor_type": "LlavaOnevisionVideoProcessor", **shared},
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": vision.places,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": f"anyres_max_{vision.most_tiles}",
        },
    }


SMALL = SmallModels(SPECIAL_TOKENS, config, files)
