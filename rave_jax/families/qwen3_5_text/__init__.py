"""Qwen3.5, text only: three of four layers have the gated delta rule, the fourth attends and gates its output."""

from rave_jax.families.base import Family
from rave_jax.families.decoder import decoder_tensors
from rave_jax.families.gated_delta import UNREAD
from rave_jax.families.qwen3_5_text.config import ARCHITECTURE, MODEL_TYPE, parse, render

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=lambda config: tuple(decoder_tensors(config.text)),
    unread=UNREAD,
)
