"""What makes a small random model of this family a whole HF directory: its config, chat format and settings files."""

from __future__ import annotations

from rave_jax.families.qwen3_vl.config import MODEL_TYPE, render
from rave_jax.families.shared.position_table.small import small_models

IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"}
VIDEOS = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}

SMALL = small_models(MODEL_TYPE, render, IMAGES, VIDEOS)
