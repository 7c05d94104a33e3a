"""Qwen2 and Qwen2.5, text only (arXiv 2407.10671): qkv bias, 1-D RoPE, a sliding window in some layers if asked for."""

from rave_jax.families.base import Family
from rave_jax.families.qwen2.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.small import small_text_models

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=lambda config: tuple(decoder_tensors(config.text)),
    small=small_text_models(MODEL_TYPE, render, qkv_bias=True),
)
