"""LLaVA-OneVision (arXiv 2408.03326): a SigLIP tower that reads pictures tile by tile, and a Qwen2 decoder."""

from rave_jax.families.base import Family
from rave_jax.families.llava_onevision.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.llava_onevision.pictures import pictures
from rave_jax.families.llava_onevision.small import SMALL
from rave_jax.families.llava_onevision.tensors import tensors
from rave_jax.families.shared.vit_keys import STYLES

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=tensors,
    pictures=pictures,
    image_processors=("LlavaOnevisionImageProcessor",),
    video_processors=("LlavaOnevisionVideoProcessor",),
    tower=f"{__name__}.tower",
    small=SMALL,
    prefixes=STYLES[0],
    more_prefixes=STYLES[1:],
)
