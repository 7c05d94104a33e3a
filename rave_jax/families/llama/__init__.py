"""Llama and the models in its shape, such as Vicuna and SmolLM2: text only, no biases, 1-D RoPE."""

from rave_jax.families.base import Family
from rave_jax.families.llama.config import ARCHITECTURE, MODEL_TYPE, parse, render
from rave_jax.families.llama.gguf import GGUF
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.small import small_text_models

FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    parse=parse,
    render=render,
    tensors=lambda config: tuple(decoder_tensors(config.text)),
    gguf=GGUF,
    small=small_text_models(MODEL_TYPE, render, qkv_bias=False, rope_theta=1e4),
)
