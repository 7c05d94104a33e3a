"""SmolVLM and SmolVLM2 (arXiv 2504.05299): SigLIP reads tiles, pixel shuffle joins their patches, text tells where each
tile stands, and the decoder is SmolLM2's."""

from rave_jax.families.base import Family
from rave_jax.families.smolvlm.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.smolvlm.pictures import pictures
from rave_jax.families.smolvlm.small import SMALL
from rave_jax.families.smolvlm.tensors import tensors

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=tensors,
    pictures=pictures,
    image_processors=("SmolVLMImageProcessor",),
    video_processors=("SmolVLMVideoProcessor",),
    tower=f"{__name__}.tower",
    small=SMALL,
)
