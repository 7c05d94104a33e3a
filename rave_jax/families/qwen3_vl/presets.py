"""Configs by name: the released Qwen3-VL sizes, and a tiny one.

4B and 8B repeat released files, and 32B the config of a model that was trained from it; tests compare them. The file of
2B was not at hand: its decoder has the sizes of Qwen3-1.7B and its tower those of 4B's.
"""

from __future__ import annotations

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen3_vl.config import MODEL_TYPE
from rave_jax.families.shared.position_table.config import TableTowerConfig
from rave_jax.families.shared.position_table.hf import EOS_ID, MARKER_IDS, MROPE_SECTION

HALVES = (0.5, 0.5, 0.5)


def small_tower(out_size: int) -> TableTowerConfig:
    """The tower of 2B and 4B."""
    return TableTowerConfig(
        depth=24,
        hidden_size=1024,
        num_heads=16,
        mlp_size=4096,
        out_size=out_size,
        table_side=48,
        deep_blocks=(5, 11, 17),
        pixel_mean=HALVES,
        pixel_std=HALVES,
    )


def large_tower(out_size: int) -> TableTowerConfig:
    """The tower of the larger ones."""
    return TableTowerConfig(
        depth=27,
        hidden_size=1152,
        num_heads=16,
        mlp_size=4304,
        out_size=out_size,
        table_side=48,
        deep_blocks=(8, 16, 24),
        pixel_mean=HALVES,
        pixel_std=HALVES,
    )


def _released(tower: TableTowerConfig, layers: int, heads: int, mlp_size: int, tied: bool) -> VlmConfig:
    text = TextConfig(
        vocab_size=151936,
        hidden_size=tower.out_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_size=mlp_size,
        rope_theta=5e6,
        mrope_section=MROPE_SECTION,
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=tied,
        max_position=262144,
    )
    return VlmConfig(text=text, vision=tower, **MARKER_IDS, eos_token_ids=(EOS_ID,), family=MODEL_TYPE)


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
    side = half // 3
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_size=2 * width,
        mrope_section=(half - 2 * side, side, side),
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=tie_embeddings,
    )
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
    return VlmConfig(
        text=text,
        vision=vision,
        image_token_id=vocab_size - 1,
        video_token_id=vocab_size - 2,
        vision_start_token_id=vocab_size - 3,
        vision_end_token_id=vocab_size - 4,
        eos_token_ids=(vocab_size - 5,),
        family=MODEL_TYPE,
    )
