"""Fine-tune Qwen3-VL-8B-Instruct with RAVE on your own data, on a TPU slice.

As `qwen2_5_vl_7b_rave_sft.py`. The mergers of the tower, which give the decoder's first layers their features, are part
of the tower and frozen with it.
"""

import dataclasses

import qwen2_5_vl_7b_rave_sft

from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF


def get_config() -> TrainConfig:
    """One row is one conversation of at most 4,096 tokens with pictures of at most 1,024 visual tokens."""
    base = qwen2_5_vl_7b_rave_sft.get_config()
    return dataclasses.replace(
        base,
        output_dir="runs/qwen3_vl_8b_rave_sft",
        init=FromHF("checkpoints/Qwen3-VL-8B-Instruct"),
        # A visual token is 32 x 32 pixels: four patches of 16 x 16.
        data=dataclasses.replace(base.data, max_pixels=1024 * 32 * 32),
    )
