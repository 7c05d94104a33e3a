"""Qwen3.5, text only: three of four layers have the gated delta rule, the fourth attends and gates its output."""

from rave_jax.families.base import Family
from rave_jax.families.qwen3_5_text.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.shared.gated_delta import UNREAD, small_text
from rave_jax.families.small import small_text_models

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=lambda config: tuple(decoder_tensors(config.text)),
    small=small_text_models(MODEL_TYPE, render, small_text),
    unread=UNREAD,
)
