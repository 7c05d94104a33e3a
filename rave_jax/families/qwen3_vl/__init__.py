"""Qwen3-VL (arXiv 2511.21631): a tower with a table of positions, DeepStack, and a decoder with M-RoPE in turns."""

from rave_jax.families.base import Family
from rave_jax.families.qwen3_vl.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.qwen3_vl.small import SMALL
from rave_jax.families.shared.position_table.pictures import timed_pictures
from rave_jax.families.shared.position_table.tensors import model_tensors

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=model_tensors,
    pictures=timed_pictures,
    image_processors=("Qwen2VLImageProcessor",),
    video_processors=("Qwen3VLVideoProcessor",),
    tower="rave_jax.families.shared.position_table.tower",
    small=SMALL,
)
