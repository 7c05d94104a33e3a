"""Configs by name: released sizes of InternVL3, as the checkpoints whose name ends in -hf have them."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import DynamicRope, TextConfig, VlmConfig
from rave_jax.families.internvl.config import IMAGE_TOKEN_ID, MODEL_TYPE, VisionConfig


def internvl3_1b() -> VlmConfig:
    """InternVL3-1B: InternViT-300M and Qwen2.5-0.5B."""
    return _model(hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64, mlp_size=4864)


def internvl3_2b() -> VlmConfig:
    """InternVL3-2B: InternViT-300M and Qwen2.5-1.5B."""
    return _model(hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128, mlp_size=8960)


def internvl3_8b() -> VlmConfig:
    """InternVL3-8B: InternViT-300M and Qwen2.5-7B."""
    return _model(hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, mlp_size=18944)


def _model(**sizes: Any) -> VlmConfig:
    text = TextConfig(
        vocab_size=151674,
        **sizes,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=DynamicRope(factor=2.0, longest=32768),
        qkv_bias=True,
        tie_embeddings=False,
        max_position=32768,
        family="qwen2",
    )
    vision = VisionConfig(
        depth=24,
        hidden_size=1024,
        num_heads=16,
        mlp_size=4096,
        patch_size=14,
        image_size=448,
        merge_size=2,
        qkv_bias=True,
        out_size=text.hidden_size,
    )
    return VlmConfig(
        text=text, vision=vision, image_token_id=IMAGE_TOKEN_ID, eos_token_ids=(151645,), family=MODEL_TYPE
    )
