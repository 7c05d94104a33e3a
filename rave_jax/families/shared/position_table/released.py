"""What released models with such a tower have in common."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.shared.grids.hf import EOS_ID, MARKER_IDS
from rave_jax.families.shared.position_table.config import TableTowerConfig
from rave_jax.families.shared.position_table.hf import MROPE_SECTION

HALVES = (0.5, 0.5, 0.5)


def released_tower(**sizes: Any) -> TableTowerConfig:
    """A tower with the heads, the table and the statistics of pixels that all of them have."""
    return TableTowerConfig(num_heads=16, table_side=48, pixel_mean=HALVES, pixel_std=HALVES, **sizes)


def large_tower(out_size: int) -> TableTowerConfig:
    """The tower of models from 8B on."""
    return released_tower(depth=27, hidden_size=1152, mlp_size=4304, deep_blocks=(8, 16, 24), out_size=out_size)


def released(tower: TableTowerConfig, family: str, **text: Any) -> VlmConfig:
    """The model around a tower, with the decoder's own sizes in `text`."""
    decoder = TextConfig(
        vocab_size=151936,
        hidden_size=tower.out_size,
        head_dim=128,
        rope_theta=5e6,
        mrope_section=MROPE_SECTION,
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
        max_position=262144,
        **text,
    )
    return VlmConfig(text=decoder, vision=tower, **MARKER_IDS, eos_token_ids=(EOS_ID,), family=family)
