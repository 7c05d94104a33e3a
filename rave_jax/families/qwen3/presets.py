"""Released sizes of Qwen3: numbers of table 1 of its report (arXiv 2505.09388) and of the config.json files."""

from __future__ import annotations

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen3.config import MODEL_TYPE


def qwen3_0_6b() -> VlmConfig:
    """Qwen3-0.6B."""
    return _released(1024, 28, 16, 3072, tied=True)


def qwen3_1_7b() -> VlmConfig:
    """Qwen3-1.7B."""
    return _released(2048, 28, 16, 6144, tied=True)


def qwen3_4b() -> VlmConfig:
    """Qwen3-4B."""
    return _released(2560, 36, 32, 9728, tied=True)


def qwen3_8b() -> VlmConfig:
    """Qwen3-8B."""
    return _released(4096, 36, 32, 12288, tied=False)


def qwen3_14b() -> VlmConfig:
    """Qwen3-14B."""
    return _released(5120, 40, 40, 17408, tied=False)


def qwen3_32b() -> VlmConfig:
    """Qwen3-32B."""
    return _released(5120, 64, 64, 25600, tied=False)


def _released(hidden_size: int, layers: int, heads: int, mlp_size: int, *, tied: bool) -> VlmConfig:
    text = TextConfig(
        vocab_size=151936,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_size=mlp_size,
        rope_theta=1e6,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=tied,
        max_position=40960,
    )
    return VlmConfig(text=text, eos_token_ids=(151645,), family=MODEL_TYPE)
