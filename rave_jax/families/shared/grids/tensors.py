"""Rules for what the towers of these families have in common, keys in the style of the released index files."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.shared.grids.config import GridTowerConfig
from rave_jax.families.shared.tower_tensors import linear


def patch_tensors(vision: GridTowerConfig) -> list[TensorRule]:
    """The projection of patches, in the shape of a convolution."""
    shape = (vision.hidden_size, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return [TensorRule("visual.patch_embed.proj.weight", "vision.patch.weight", None, None, shape)]


def attention_tensors(vision: GridTowerConfig, block: int) -> list[TensorRule]:
    """The attention of a block."""
    D, key = vision.hidden_size, f"visual.blocks.{block}.attn"
    return [
        *linear(f"{key}.qkv", "attention.qkv", 3 * D, D, block),
        *linear(f"{key}.proj", "attention.output", D, D, block),
    ]


def merger_tensors(vision: GridTowerConfig) -> list[TensorRule]:
    """The two linears of the merger."""
    joined = vision.hidden_size * vision.merge_unit
    return [
        *linear("visual.merger.mlp.0", "vision.merger.first", joined, joined),
        *linear("visual.merger.mlp.2", "vision.merger.second", vision.out_size, joined),
    ]
