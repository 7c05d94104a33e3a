"""Qwen2-VL (arXiv 2409.12191): a tower that attends over the whole frame, and a decoder with M-RoPE."""

from rave_jax.families.base import Family
from rave_jax.families.qwen2_vl.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.qwen2_vl.pictures import pictures
from rave_jax.families.qwen2_vl.small import SMALL
from rave_jax.families.qwen2_vl.tensors import tensors
from rave_jax.families.shared.grids.hf import PREFIXES

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=tensors,
    pictures=pictures,
    image_processors=("Qwen2VLImageProcessor",),
    video_processors=("Qwen2VLVideoProcessor",),
    tower=f"{__name__}.tower",
    small=SMALL,
    prefixes=PREFIXES,
)
