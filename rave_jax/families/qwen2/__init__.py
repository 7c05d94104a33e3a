"""Qwen2 and Qwen2.5, text only (arXiv 2407.10671): qkv bias, 1-D RoPE, a sliding window in some layers if asked for."""

from rave_jax.families.base import Family
from rave_jax.families.decoder import decoder_tensors
from rave_jax.families.qwen2.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.qwen2.small import SMALL

__all__ = ["FAMILY", "SMALL"]

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=lambda config: tuple(decoder_tensors(config.text)),
)
