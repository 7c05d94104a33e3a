"""Configs by name: the released Qwen3-VL sizes with experts, and a tiny one.

30B-A3B repeats a released file; a test compares them. The file of 235B-A22B was not at hand: its decoder has the sizes
of Qwen3-235B-A22B and its tower those of 30B-A3B's.
"""

from __future__ import annotations

from rave_jax.families.config import ExpertsConfig, VlmConfig
from rave_jax.families.qwen3_vl_moe.config import MODEL_TYPE
from rave_jax.families.shared.position_table.released import large_tower, released


def _released(width: int, layers: int, heads: int, mlp_size: int, expert_size: int) -> VlmConfig:
    experts = ExpertsConfig(count=128, chosen=8, mlp_size=expert_size)
    return released(
        large_tower(width),
        MODEL_TYPE,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=4,
        mlp_size=mlp_size,
        tie_embeddings=False,
        experts=experts,
    )


def qwen3_vl_30b_a3b() -> VlmConfig:
    """Qwen3-VL-30B-A3B-Instruct."""
    return _released(2048, 48, 32, 6144, 768)


def qwen3_vl_235b_a22b() -> VlmConfig:
    """Qwen3-VL-235B-A22B-Instruct."""
    return _released(4096, 94, 64, 12288, 1536)


RELEASED = {
    "Qwen3-VL-30B-A3B-Instruct": qwen3_vl_30b_a3b,
    "Qwen3-VL-235B-A22B-Instruct": qwen3_vl_235b_a22b,
}
"""Folder name of a released checkpoint -> its shapes."""
