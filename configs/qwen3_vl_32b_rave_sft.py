"""Fine-tune Qwen3-VL-32B-Instruct with RAVE on your own data, on 128 chips of v5p.

As `qwen3_vl_8b_rave_sft.py`. Parameters and both moments of Adam take 400 GB in float32, which `fsdp` and
`tensor` split.
"""

import dataclasses

import qwen3_vl_8b_rave_sft

from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF


def get_config() -> TrainConfig:
    """One row is packed with conversations, at most 4,096 tokens with pictures of at most 1,024 visual tokens each."""
    return dataclasses.replace(
        qwen3_vl_8b_rave_sft.get_config(),
        output_dir="runs/qwen3_vl_32b_rave_sft",
        init=FromHF("checkpoints/Qwen3-VL-32B-Instruct"),
        mesh=MeshConfig(fsdp=-1, tensor=4),
    )
