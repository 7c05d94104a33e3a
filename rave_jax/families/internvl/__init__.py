"""InternVL3 in the form of transformers (arXiv 2504.10479): InternViT reads tiles, pixel shuffle makes a visual token
of four patches, and the decoder has 1-D RoPE."""

from rave_jax.families.base import Family
from rave_jax.families.internvl.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.internvl.pictures import pictures
from rave_jax.families.internvl.small import SMALL
from rave_jax.families.internvl.tensors import PREFIXES, tensors

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=tensors,
    pictures=pictures,
    image_processors=("GotOcr2ImageProcessor",),
    video_processors=("InternVLVideoProcessor",),
    tower=f"{__name__}.tower",
    small=SMALL,
    prefixes=PREFIXES,
)
