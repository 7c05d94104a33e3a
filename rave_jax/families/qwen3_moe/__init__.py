"""Qwen3-MoE, text only (arXiv 2505.09388): Qwen3 with experts in place of the mlps."""

from rave_jax.families.base import Family
from rave_jax.families.config import ExpertsConfig
from rave_jax.families.qwen3_moe.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.shared.experts import fused
from rave_jax.families.small import small_text_models

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=lambda config: tuple(decoder_tensors(config.text)),
    other_tensors=(lambda config: tuple(decoder_tensors(config.text, fused)),),
    small=small_text_models(
        MODEL_TYPE,
        render,
        qkv_bias=False,
        qk_norm=True,
        experts=ExpertsConfig(count=8, chosen=2, mlp_size=24, dense_layers=(1,)),
    ),
)
