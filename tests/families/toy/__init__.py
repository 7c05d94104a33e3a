"""A family that is none of the package's, written from docs/families.md: pictures are cropped to one size and read by a
tower without windows, text stands between the frames of a video, and positions are one number for all three axes."""

from rave_jax.families.base import Family
from rave_jax.families.shared.decoder import decoder_tensors
from tests.families.toy.config import ARCHITECTURE, MODEL_TYPE, parse, render, tower_tensors
from tests.families.toy.pictures import pictures

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=lambda config: (*tower_tensors(config), *decoder_tensors(config.text)),
    pictures=pictures,
    tower=f"{__name__}.tower",
)
