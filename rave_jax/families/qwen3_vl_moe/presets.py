"""Configs by name: the released Qwen3-VL sizes with experts, and a tiny one.

30B-A3B repeats a released file; a test compares them. The file of 235B-A22B was not at hand: its decoder has the sizes
of Qwen3-235B-A22B and its tower those of 30B-A3B's.
"""

from __future__ import annotations

from rave_jax.families.config import ExpertsConfig, TextConfig, VlmConfig
from rave_jax.families.qwen3_vl_moe.config import MODEL_TYPE
from rave_jax.families.shared.position_table.config import TableTowerConfig
from rave_jax.families.shared.position_table.hf import EOS_ID, MARKER_IDS, MROPE_SECTION

HALVES = (0.5, 0.5, 0.5)


def _released(width: int, layers: int, heads: int, mlp_size: int, expert_size: int) -> VlmConfig:
    text = TextConfig(
        vocab_size=151936,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=4,
        head_dim=128,
        mlp_size=mlp_size,
        rope_theta=5e6,
        mrope_section=MROPE_SECTION,
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=False,
        max_position=262144,
        experts=ExpertsConfig(count=128, chosen=8, mlp_size=expert_size),
    )
    tower = TableTowerConfig(
        depth=27,
        hidden_size=1152,
        num_heads=16,
        mlp_size=4304,
        out_size=width,
        table_side=48,
        deep_blocks=(8, 16, 24),
        pixel_mean=HALVES,
        pixel_std=HALVES,
    )
    return VlmConfig(text=text, vision=tower, **MARKER_IDS, eos_token_ids=(EOS_ID,), family=MODEL_TYPE)


def qwen3_vl_30b_a3b() -> VlmConfig:
    """Qwen3-VL-30B-A3B-Instruct."""
    return _released(2048, 48, 32, 6144, 768)


def qwen3_vl_235b_a22b() -> VlmConfig:
    """Qwen3-VL-235B-A22B-Instruct."""
    return _released(4096, 94, 64, 12288, 1536)
