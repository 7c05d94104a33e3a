"""What makes a small random model of this family a whole HF directory: its config, chat format and settings files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.internvl.config import MODEL_TYPE, VisionConfig, render
from rave_jax.families.small import CHATML_TOKENS, SmallModels, SmallSizes, chatml, model_files, small_text

SPECIAL_TOKENS = (*CHATML_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
SIDE = 2
"""Visual tokens along the side of a tile."""

CHAT_TEMPLATE = chatml(image="{{- '<IMG_CONTEXT>\\n' -}}", video="{{- '<video>\\n' -}}")


def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
    """The model config, with what the released towers have: biases, no norm of queries and keys."""
    vision = VisionConfig(
        depth=sizes.vision_layers,
        hidden_size=sizes.vision_hidden_size,
        num_heads=sizes.vision_heads,
        mlp_size=sizes.vision_mlp_size,
        patch_size=sizes.patch_size,
        merge_size=sizes.merge_size,
        image_size=SIDE * sizes.merge_size * sizes.patch_size,
        qkv_bias=True,
        out_size=sizes.hidden_size,
    )
    return VlmConfig(
        text=small_text(sizes, vocab_size, family="qwen2"),
        vision=vision,
        image_token_id=ids["<IMG_CONTEXT>"],
        eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]),
        family=MODEL_TYPE,
    )


def files(config: VlmConfig, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What its JSON files hold, by name."""
    vision = tower_of(config, VisionConfig)
    stated = model_files(render(config), config.eos_token_ids, ids, CHAT_TEMPLATE, config.text.max_position)
    shared = {
        "size": {"height": vision.image_size, "width": vision.image_size},
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
    stated["tokenizer_config.json"] |= {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return stated | {
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 12,
            **shared,
        },
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": vision.token_side**2},
        "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", **shared},
    }


SMALL = SmallModels(SPECIAL_TOKENS, config, files)
