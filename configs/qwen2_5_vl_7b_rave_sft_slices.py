"""Fine-tune Qwen2.5-VL-7B with RAVE on two TPU slices: each keeps all parameters, and gradients go between them.

See qwen2_5_vl_7b_rave_sft.py for the data. For more slices set `mesh.data` to their number.
"""

import dataclasses

import qwen2_5_vl_7b_rave_sft

from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """A row is packed with conversations, at most 4,096 tokens with pictures of at most 1,024 visual tokens each."""
    base = qwen2_5_vl_7b_rave_sft.get_config()
    return dataclasses.replace(
        base,
        output_dir="runs/qwen2_5_vl_7b_rave_sft_slices",
        data=dataclasses.replace(base.data, rows=256),
        mesh=MeshConfig(data=2, fsdp=-1, tensor=2),
    )
