"""Released sizes of Qwen3-MoE: numbers of their config.json files."""

from __future__ import annotations

from rave_jax.families.config import ExpertsConfig, TextConfig, VlmConfig
from rave_jax.families.qwen3_moe.config import MODEL_TYPE


def _model(width: int, layers: int, heads: int, mlp: int, expert: int) -> VlmConfig:
    text = TextConfig(
        vocab_size=151936,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=4,
        head_dim=128,
        mlp_size=mlp,
        rope_theta=1e6,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=False,
        max_position=40960,
        experts=ExpertsConfig(count=128, chosen=8, mlp_size=expert),
    )
    return VlmConfig(text=text, eos_token_ids=(151645,), family=MODEL_TYPE)


def qwen3_30b_a3b() -> VlmConfig:
    """Qwen3-30B-A3B: 3.3 of 30.5 billion parameters for each token."""
    return _model(2048, 48, 32, 6144, 768)


def qwen3_235b_a22b() -> VlmConfig:
    """Qwen3-235B-A22B."""
    return _model(4096, 94, 64, 12288, 1536)
