"""Qwen2.5-VL (arXiv 2502.13923): a tower with windowed attention, and a decoder with M-RoPE."""

from rave_jax.families.base import Family
from rave_jax.families.qwen2_5_vl.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.qwen2_5_vl.small import SMALL
from rave_jax.families.qwen2_5_vl.tensors import tensors
from rave_jax.families.shared.grids.hf import PREFIXES
from rave_jax.families.shared.grids.pictures import pictures

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=tensors,
    pictures=pictures,
    image_processors=("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"),
    video_processors=("Qwen2VLVideoProcessor",),
    tower=f"{__name__}.tower",
    small=SMALL,
    prefixes=PREFIXES,
)
