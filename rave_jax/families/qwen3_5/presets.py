"""Configs by name: the released Qwen3.5 size whose config.json was at hand.

0.8B repeats that file; a test compares them. Other sizes are read by `family_for(config).parse`.
"""

from __future__ import annotations

from rave_jax.families.config import DeltaConfig, TextConfig, VlmConfig
from rave_jax.families.qwen3_5.config import EOS_ID, MARKER_IDS, MODEL_TYPE
from rave_jax.families.shared.gated_delta import MROPE_SECTION
from rave_jax.families.shared.position_table.config import TableTowerConfig

HALVES = (0.5, 0.5, 0.5)


def qwen3_5_800m() -> VlmConfig:
    """Qwen3.5-0.8B."""
    layers = 24
    text = TextConfig(
        vocab_size=248320,
        hidden_size=1024,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=2,
        head_dim=256,
        mlp_size=3584,
        rope_theta=1e7,
        mrope_section=MROPE_SECTION,
        mrope_interleaved=True,
        rotary_part=64,
        qkv_bias=False,
        qk_norm=True,
        output_gate=True,
        norm_plus_one=True,
        tie_embeddings=True,
        max_position=262144,
        delta=DeltaConfig(
            layers=tuple(n for n in range(layers) if n % 4 != 3),
            key_heads=16,
            value_heads=16,
            key_dim=128,
            value_dim=128,
        ),
    )
    vision = TableTowerConfig(
        depth=12,
        hidden_size=768,
        num_heads=12,
        mlp_size=3072,
        out_size=text.hidden_size,
        table_side=48,
        deep_blocks=(),
        pixel_mean=HALVES,
        pixel_std=HALVES,
    )
    return VlmConfig(text=text, vision=vision, **MARKER_IDS, eos_token_ids=(EOS_ID,), family=MODEL_TYPE)
