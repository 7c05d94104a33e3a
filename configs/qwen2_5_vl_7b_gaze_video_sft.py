"""Fine-tune Qwen2.5-VL-7B-Instruct with Gaze Attention on videos of 64 frames, on 64 chips of v5p.

As `qwen2_5_vl_7b_gaze_sft.py`, with longer rows: two frames make one temporal step of the tower, so that a video of 64
frames of 448 x 448 pixels has 32 steps of 256 visual tokens, 8,192 in all, in 128 regions of 8 x 8. A query reads a
quarter of the regions before it, and visual tokens choose among earlier frames too.
"""

import dataclasses

import qwen2_5_vl_7b_gaze_sft

from rave_jax.attention import Gaze
from rave_jax.layout import FixedRegions
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """One row is a video of 64 frames with its conversation, or as many shorter samples as fit."""
    base = qwen2_5_vl_7b_gaze_sft.get_config()
    gaze = Gaze(regions=FixedRegions(8, 8), max_regions=256, top_k=0.25, share="group", visual_queries="frame+routed")
    return dataclasses.replace(
        base,
        output_dir="runs/qwen2_5_vl_7b_gaze_video_sft",
        model=dataclasses.replace(base.model, mechanisms=(gaze,)),
        data=dataclasses.replace(base.data, rows=16, tokens=10240, patches=32768, max_pixels=448 * 448),
        mesh=MeshConfig(fsdp=-1, tensor=4),
    )
