"""Configs by name: released sizes, as their config.json files have them."""

from __future__ import annotations

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.llava_onevision.config import (
    IMAGE_TOKEN_ID,
    MODEL_TYPE,
    PINPOINTS,
    VIDEO_TOKEN_ID,
    AnyresConfig,
)

EOS_ID = 151645


def _released(width: int, mlp: int, layers: int, heads: int, kv_heads: int, rows: int, tied: bool) -> VlmConfig:
    text = TextConfig(
        vocab_size=rows,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_size=mlp,
        rope_theta=1e6,
        qkv_bias=True,
        tie_embeddings=tied,
        max_position=32768,
        family="qwen2",
    )
    vision = AnyresConfig(
        depth=26,
        hidden_size=1152,
        num_heads=16,
        mlp_size=4304,
        patch_size=14,
        image_size=384,
        feature_layers=(26,),
        out_size=width,
        pinpoints=PINPOINTS,
    )
    return VlmConfig(
        text=text,
        vision=vision,
        image_token_id=IMAGE_TOKEN_ID,
        video_token_id=VIDEO_TOKEN_ID,
        eos_token_ids=(EOS_ID,),
        family=MODEL_TYPE,
    )


def llava_onevision_0_5b() -> VlmConfig:
    """llava-onevision-qwen2-0.5b-ov-hf."""
    return _released(896, 4864, 24, 14, 2, 152000, tied=True)


def llava_onevision_7b() -> VlmConfig:
    """llava-onevision-qwen2-7b-ov-hf."""
    return _released(3584, 18944, 28, 28, 4, 152128, tied=False)
