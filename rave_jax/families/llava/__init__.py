"""LLaVA-1.5 (arXiv 2310.03744): a CLIP tower, an mlp as projector, and a decoder with 1-D RoPE."""

from rave_jax.families.base import Family
from rave_jax.families.llava.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.llava.join import JOIN
from rave_jax.families.llava.original import ORIGINAL
from rave_jax.families.llava.pictures import pictures
from rave_jax.families.llava.small import SMALL
from rave_jax.families.llava.tensors import tensors
from rave_jax.families.shared.vit_keys import STYLES

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=tensors,
    pictures=pictures,
    image_processors=("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor"),
    tower=f"{__name__}.tower",
    small=SMALL,
    join=JOIN,
    prefixes=STYLES[0],
    more_prefixes=STYLES[1:],
    original=ORIGINAL,
)
