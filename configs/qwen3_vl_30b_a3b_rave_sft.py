"""Fine-tune Qwen3-VL-30B-A3B-Instruct, a model with experts, with RAVE on your own data, on a TPU slice.

As `qwen3_vl_8b_rave_sft.py`. Of 128 experts eight read each token. The mesh axis `tensor` splits the experts, so it is
larger here, and the load-balancing loss of the routers is part of the training loss. Parameters and both moments of
Adam take 373 GB in float32, which `fsdp` and `tensor` split.
"""

import dataclasses

import qwen3_vl_8b_rave_sft

from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF


def get_config() -> TrainConfig:
    """One row is one conversation of at most 4,096 tokens with pictures of at most 1,024 visual tokens."""
    return dataclasses.replace(
        qwen3_vl_8b_rave_sft.get_config(),
        output_dir="runs/qwen3_vl_30b_a3b_rave_sft",
        init=FromHF("checkpoints/Qwen3-VL-30B-A3B-Instruct"),
        mesh=MeshConfig(fsdp=-1, tensor=8),
    )
