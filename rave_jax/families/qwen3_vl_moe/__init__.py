"""Qwen3-VL with experts (arXiv 2511.21631): as Qwen3-VL, with a router and experts in place of the decoder's mlps."""

from rave_jax.families.base import Family
from rave_jax.families.qwen3_vl_moe.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.qwen3_vl_moe.small import SMALL
from rave_jax.families.shared.experts import fused, fused_swapped
from rave_jax.families.shared.position_table.pictures import timed_pictures
from rave_jax.families.shared.position_table.tensors import model_tensors

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=lambda config: model_tensors(config, fused_swapped),
    other_tensors=(lambda config: model_tensors(config, fused),),
    pictures=timed_pictures,
    image_processors=("Qwen2VLImageProcessor",),
    video_processors=("Qwen3VLVideoProcessor",),
    tower="rave_jax.families.shared.position_table.tower",
    small=SMALL,
)
