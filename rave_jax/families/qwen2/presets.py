"""Released sizes of Qwen2: numbers of their config.json files."""

from __future__ import annotations

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen2.config import MODEL_TYPE


def qwen2_0_5b() -> VlmConfig:
    """Qwen2-0.5B-Instruct."""
    text = TextConfig(
        vocab_size=151936,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        mlp_size=4864,
        rope_theta=1e6,
        qkv_bias=True,
        tie_embeddings=True,
        max_position=32768,
    )
    return VlmConfig(text=text, eos_token_ids=(151645,), family=MODEL_TYPE)


def qwen2_7b() -> VlmConfig:
    """Qwen2-7B-Instruct."""
    text = TextConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_size=18944,
        rope_theta=1e6,
        qkv_bias=True,
        tie_embeddings=False,
        max_position=32768,
    )
    return VlmConfig(text=text, eos_token_ids=(151645,), family=MODEL_TYPE)
