"""Configs by name: the released sizes whose config.json we have read."""

from __future__ import annotations

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.smolvlm.config import MODEL_TYPE, VisionConfig


def smolvlm2_500m() -> VlmConfig:
    """SmolVLM2-500M-Video-Instruct, its config.json alone (generation_config.json names the id that ends an answer)."""
    text = TextConfig(
        vocab_size=49280,
        hidden_size=960,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        head_dim=64,
        mlp_size=2560,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        qkv_bias=False,
        tie_embeddings=False,
        max_position=8192,
        family="llama",
    )
    vision = VisionConfig(
        depth=12,
        hidden_size=768,
        num_heads=12,
        mlp_size=3072,
        patch_size=16,
        image_size=512,
        merge_size=4,
        kind="siglip",
        activation="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        feature_layers=(12,),
        projector_bias=False,
        out_size=960,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    )
    return VlmConfig(text=text, vision=vision, image_token_id=49190, eos_token_ids=(2,), family=MODEL_TYPE)
