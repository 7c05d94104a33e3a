"""Fine-tune Qwen2.5-VL-3B-Instruct with RAVE on your own data, on 16 chips of v5e.

As `qwen2_5_vl_7b_rave_sft.py`, with as many rows as `v5e:4x4` has room for.
"""

import dataclasses

import qwen2_5_vl_7b_rave_sft

from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF


def get_config() -> TrainConfig:
    """One row is packed with conversations, at most 4,096 tokens with pictures of at most 1,024 visual tokens each."""
    base = qwen2_5_vl_7b_rave_sft.get_config()
    return dataclasses.replace(
        base,
        output_dir="runs/qwen2_5_vl_3b_rave_sft",
        init=FromHF("checkpoints/Qwen2.5-VL-3B-Instruct"),
        data=dataclasses.replace(base.data, rows=16),
    )
