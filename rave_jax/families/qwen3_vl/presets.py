"""Configs by name: the released Qwen3-VL sizes, and a tiny one.

4B and 8B repeat released files, and 32B the config of a model that was trained from it; tests compare them. The file of
2B was not at hand: its decoder has the sizes of Qwen3-1.7B and its tower those of 4B's.
"""

from __future__ import annotations

from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen3_vl.config import MODEL_TYPE
from rave_jax.families.shared.grids.tiny import mrope_thirds, tiny_model
from rave_jax.families.shared.position_table.config import TableTowerConfig
from rave_jax.families.shared.position_table.released import large_tower, released, released_tower


def small_tower(out_size: int) -> TableTowerConfig:
    """The tower of 2B and 4B."""
    return released_tower(depth=24, hidden_size=1024, mlp_size=4096, deep_blocks=(5, 11, 17), out_size=out_size)


def _released(tower: TableTowerConfig, layers: int, heads: int, mlp_size: int, tied: bool) -> VlmConfig:
    return released(
        tower, MODEL_TYPE, num_layers=layers, num_heads=heads, num_kv_heads=8, mlp_size=mlp_size, tie_embeddings=tied
    )


def qwen3_vl_2b() -> VlmConfig:
    """Qwen3-VL-2B-Instruct."""
    return _released(small_tower(2048), 28, 16, 6144, tied=True)


def qwen3_vl_4b() -> VlmConfig:
    """Qwen3-VL-4B-Instruct."""
    return _released(small_tower(2560), 36, 32, 9728, tied=True)


def qwen3_vl_8b() -> VlmConfig:
    """Qwen3-VL-8B-Instruct."""
    return _released(large_tower(4096), 36, 32, 12288, tied=False)


def qwen3_vl_32b() -> VlmConfig:
    """Qwen3-VL-32B-Instruct."""
    return _released(large_tower(5120), 64, 64, 25600, tied=False)


def tiny(
    *,
    vocab_size: int = 512,
    width: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 12,
    tie_embeddings: bool = True,
    vision_depth: int = 3,
    deep_blocks: tuple[int, ...] = (0, 1),
    table_side: int = 5,
) -> VlmConfig:
    """A model of the same architecture that runs in milliseconds. Placeholder and marker ids are the last five of the
    vocabulary."""
    half = head_dim // 2
    vision = TableTowerConfig(
        depth=vision_depth,
        hidden_size=16,
        num_heads=2,
        mlp_size=24,
        patch_size=4,
        out_size=width,
        table_side=table_side,
        deep_blocks=deep_blocks,
    )
    return tiny_model(
        MODEL_TYPE,
        vision,
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mrope_section=mrope_thirds(half, half // 3),
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=tie_embeddings,
    )


RELEASED = {
    "Qwen3-VL-2B-Instruct": qwen3_vl_2b,
    "Qwen3-VL-4B-Instruct": qwen3_vl_4b,
    "Qwen3-VL-8B-Instruct": qwen3_vl_8b,
    "Qwen3-VL-32B-Instruct": qwen3_vl_32b,
}
"""Folder name of a released checkpoint -> its shapes."""
