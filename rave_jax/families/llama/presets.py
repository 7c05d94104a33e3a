"""Released sizes of models in Llama's shape: numbers of their config.json files."""

from __future__ import annotations

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.llama.config import MODEL_TYPE


def _model(text: TextConfig, eos: int) -> VlmConfig:
    return VlmConfig(text=text, eos_token_ids=(eos,), family=MODEL_TYPE)


def _smollm2(width: int, mlp: int, layers: int, heads: int, kv_heads: int, theta: float) -> VlmConfig:
    text = TextConfig(
        vocab_size=49152,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=64,
        mlp_size=mlp,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        qkv_bias=False,
        tie_embeddings=True,
        max_position=8192,
    )
    return _model(text, 2)


def smollm2_135m() -> VlmConfig:
    """SmolLM2-135M-Instruct."""
    return _smollm2(576, 1536, 30, 9, 3, 1e5)


def smollm2_360m() -> VlmConfig:
    """SmolLM2-360M-Instruct."""
    return _smollm2(960, 2560, 32, 15, 5, 1e5)


def smollm2_1_7b() -> VlmConfig:
    """SmolLM2-1.7B-Instruct."""
    return _smollm2(2048, 8192, 24, 32, 32, 1.3e5)


def llama_2_7b() -> VlmConfig:
    """Llama-2-7b and Vicuna-7b-v1.5, which was trained from it."""
    text = TextConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_size=11008,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        qkv_bias=False,
        tie_embeddings=False,
        max_position=4096,
    )
    return _model(text, 2)
