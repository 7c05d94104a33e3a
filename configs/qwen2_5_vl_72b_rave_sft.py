"""Fine-tune Qwen2.5-VL-72B-Instruct with RAVE on your own data, on 512 chips of v5p.

As `qwen2_5_vl_7b_rave_sft.py`. Parameters and both moments of Adam take 880 GB in float32, which `fsdp` and
`tensor` split; the mesh axis `tensor` is larger here.
"""

import dataclasses

import qwen2_5_vl_7b_rave_sft

from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF


def get_config() -> TrainConfig:
    """One row is packed with conversations, at most 4,096 tokens with pictures of at most 1,024 visual tokens each."""
    base = qwen2_5_vl_7b_rave_sft.get_config()
    return dataclasses.replace(
        base,
        output_dir="runs/qwen2_5_vl_72b_rave_sft",
        init=FromHF("checkpoints/Qwen2.5-VL-72B-Instruct"),
        model=dataclasses.replace(base.model, remat="full"),
        mesh=MeshConfig(fsdp=-1, tensor=8),
    )
