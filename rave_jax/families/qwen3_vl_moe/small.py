"""What makes a small random model of this family a whole HF directory: its config, chat format and settings files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rave_jax.families.config import ExpertsConfig, VlmConfig
from rave_jax.families.qwen3_vl_moe.config import MODEL_TYPE, render
from rave_jax.families.shared.position_table.small import small_models
from rave_jax.families.small import SmallSizes

IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"}
VIDEOS = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
EXPERTS, CHOSEN = 8, 3

_DENSE = small_models(MODEL_TYPE, render, IMAGES, VIDEOS)


def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
    """The model config. Experts have a quarter of the width of an mlp."""
    made = _DENSE.config(sizes, vocab_size, ids)
    experts = ExpertsConfig(EXPERTS, CHOSEN, max(1, sizes.mlp_size // 4))
    return dataclasses.replace(made, text=dataclasses.replace(made.text, experts=experts))


SMALL = _DENSE._replace(config=config)
