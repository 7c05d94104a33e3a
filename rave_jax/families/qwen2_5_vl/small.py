"""What makes a small random model of this family a whole HF directory: its config, chat format and settings files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen2_5_vl.config import MODEL_TYPE, VisionConfig, render
from rave_jax.families.shared.grids import small
from rave_jax.families.small import SmallModels, SmallSizes

PROCESSORS = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}


def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
    """The model config. The last block of the tower attends over the whole frame."""
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
    return small.model_config(sizes, vocab_size, ids, vision, MODEL_TYPE)


def files(config: VlmConfig, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What its JSON files hold, by name."""
    return small.files(config, ids, render(config), PROCESSORS)


SMALL = SmallModels(small.SPECIAL_TOKENS, config, files)
