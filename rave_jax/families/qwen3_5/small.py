"""What makes a small random model of this family a whole HF directory: its config, chat format and settings files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen3_5.config import MODEL_TYPE, render
from rave_jax.families.shared.gated_delta import small_text
from rave_jax.families.shared.position_table.small import small_models, tower
from rave_jax.families.small import SmallModels, SmallSizes

IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"}
VIDEOS = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
OF_ATTENTION = small_models(MODEL_TYPE, render, IMAGES, VIDEOS)
"""The same models with plain attention in all layers and a tower that gives features to some of them."""


def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
    """The model config."""
    made = OF_ATTENTION.config(sizes, vocab_size, ids)
    return dataclasses.replace(made, text=small_text(sizes, vocab_size), vision=tower(sizes, 0))


SMALL = SmallModels(OF_ATTENTION.special_tokens, config, OF_ATTENTION.files)
