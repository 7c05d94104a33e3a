"""Fine-tune Qwen2.5-VL-7B-Instruct with Gaze Attention on your own data, on a TPU slice.

As `qwen2_5_vl_7b_rave_sft.py`, with sparse reading of pictures in place of a gate: regions of 8 x 8, a quarter of them
for each query, four context tokens. Training starts dense, so the first step computes the released model (and four new
tokens), and comes down to a quarter in the first half of the run. The query heads of a kv head choose together (the
authors' choose apart): so the kernels skip what was not chosen, and a decoding step reads about a quarter.
"""

import dataclasses

import qwen2_5_vl_7b_rave_sft

from rave_jax.attention import Gaze
from rave_jax.layout import ContextTokens, FixedRegions
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.config import TrainConfig
from rave_jax.training.optimizers import ParameterGroup


def get_config() -> TrainConfig:
    """One row is one conversation of at most 4,096 tokens with pictures of at most 1,024 visual tokens."""
    base = qwen2_5_vl_7b_rave_sft.get_config()
    # Of the 2,048 visual tokens that a row has room for: two square pictures have 32 regions, two of 5 x 204 have 52.
    gaze = Gaze(regions=FixedRegions(8, 8), max_regions=64, top_k=0.25, share="group")
    tower = next(group for group in base.optimizer.groups if group.name == "tower")
    context = ParameterGroup(name="context", pattern=r"^context", learning_rate=5.0, weight_decay=0.0)
    return dataclasses.replace(
        base,
        output_dir="runs/qwen2_5_vl_7b_gaze_sft",
        model=dataclasses.replace(base.model, mechanisms=(gaze,), context=ContextTokens(4), remat="full"),
        mesh=MeshConfig(fsdp=-1, tensor=4),
        optimizer=dataclasses.replace(base.optimizer, groups=(tower, context)),
    )
