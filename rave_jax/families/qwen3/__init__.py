"""Qwen3, text only (arXiv 2505.09388): q/k norm, no qkv bias, 1-D RoPE."""

from rave_jax.families.base import Family
from rave_jax.families.qwen3.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.small import small_text_models

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=lambda config: tuple(decoder_tensors(config.text)),
    small=small_text_models(MODEL_TYPE, render, qkv_bias=False, qk_norm=True),
)
