"""Qwen3.5 with pictures: the tower of a table of positions, and a decoder of gated delta layers and gated attention."""

from rave_jax.families.base import Family
from rave_jax.families.qwen3_5.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.qwen3_5.small import SMALL
from rave_jax.families.shared.gated_delta import UNREAD
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
    unread=UNREAD,
)
