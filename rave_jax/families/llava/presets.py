"""Configs by name: released sizes, as their config.json files have them, and a tiny one."""

from __future__ import annotations

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.llava.config import IMAGE_TOKEN_ID, MODEL_TYPE
from rave_jax.families.shared.vit import VitConfig

VOCAB_SIZE = 32064
EOS_ID = 2


def clip_large(out_size: int) -> VitConfig:
    """CLIP ViT-L/14 at 336 pixels, read before its last block."""
    return VitConfig(
        depth=24,
        hidden_size=1024,
        num_heads=16,
        mlp_size=4096,
        patch_size=14,
        image_size=336,
        feature_layers=(23,),
        out_size=out_size,
    )


def _vicuna(width: int, mlp: int, layers: int, heads: int) -> VlmConfig:
    text = TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        mlp_size=mlp,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        qkv_bias=False,
        tie_embeddings=False,
        max_position=4096,
        family="llama",
    )
    return VlmConfig(
        text=text,
        vision=clip_large(width),
        image_token_id=IMAGE_TOKEN_ID,
        eos_token_ids=(EOS_ID,),
        family=MODEL_TYPE,
    )


def llava_1_5_7b() -> VlmConfig:
    """llava-1.5-7b-hf."""
    return _vicuna(4096, 11008, 32, 32)


def llava_1_5_13b() -> VlmConfig:
    """llava-1.5-13b-hf."""
    return _vicuna(5120, 13824, 40, 40)


RELEASED = {
    "llava-1.5-7b-hf": llava_1_5_7b,
    "llava-1.5-13b-hf": llava_1_5_13b,
}
"""Folder name of a released checkpoint -> its shapes."""
