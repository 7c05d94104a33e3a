"""Configs by name: the released Qwen2-VL sizes, and tiny ones.

7B repeats the `config.json` of Qwen/Qwen2-VL-7B-Instruct as its fine-tunes publish it, 2B that of the AWQ version of
Qwen/Qwen2-VL-2B-Instruct without its quantisation; a test compares them with the files.
"""

from __future__ import annotations

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen2_vl.config import MODEL_TYPE, VisionConfig
from rave_jax.families.shared.grids.hf import EOS_ID, MARKER_IDS
from rave_jax.families.shared.grids.tiny import mrope_thirds, tiny_model


def _released(text: TextConfig) -> VlmConfig:
    vision = VisionConfig(depth=32, hidden_size=1280, num_heads=16, mlp_size=5120, out_size=text.hidden_size)
    return VlmConfig(text=text, vision=vision, **MARKER_IDS, eos_token_ids=(EOS_ID,), family=MODEL_TYPE)


def qwen2_vl_2b() -> VlmConfig:
    """Qwen2-VL-2B-Instruct."""
    text = TextConfig(
        vocab_size=151936,
        hidden_size=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        mlp_size=8960,
        mrope_section=(16, 24, 24),
        tie_embeddings=True,
    )
    return _released(text)


def qwen2_vl_7b() -> VlmConfig:
    """Qwen2-VL-7B-Instruct."""
    text = TextConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_size=18944,
        mrope_section=(16, 24, 24),
        tie_embeddings=False,
    )
    return _released(text)


def tiny(
    *,
    vocab_size: int = 512,
    width: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    tie_embeddings: bool = True,
    vision_depth: int = 2,
) -> VlmConfig:
    """A model of the same architecture that runs in milliseconds.

    Placeholder and marker ids are the last five of the vocabulary.
    """
    half = width // num_heads // 2
    vision = VisionConfig(depth=vision_depth, hidden_size=16, num_heads=2, mlp_size=32, patch_size=4, out_size=width)
    return tiny_model(
        MODEL_TYPE,
        vision,
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=width // num_heads,
        mrope_section=mrope_thirds(half, (half + 1) // 3),
        tie_embeddings=tie_embeddings,
    )
