"""HF configs of models with such a tower, and of the decoder that most of them have.

Configs come in two styles: with `rope_scaling` (as released) and with `rope_parameters` (as transformers 5 saves).
Defaults of absent keys are those of transformers' config classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.config import (
    MAX_HEADS,
    MAX_INT32,
    MAX_LAYERS,
    MAX_SIDE,
    MAX_VOCAB,
    MAX_WIDTH,
    TextConfig,
    VlmConfig,
    tower_of,
)
from rave_jax.families.hf import (
    HfConfig,
    eos_ids,
    flag,
    integer,
    integers,
    kv_heads,
    needed,
    norm_eps,
    only,
    rope_theta,
    section,
)
from rave_jax.families.shared.grids.hf import EOS_ID, MARKER_IDS
from rave_jax.families.shared.position_table.config import TableTowerConfig

TEXT, VISION = "config.json: text_config", "config.json: vision_config"
MROPE_SECTION = (24, 20, 20)


def markers(hf: HfConfig, released: Mapping[str, int] = MARKER_IDS) -> dict[str, int]:
    """Ids of the placeholders and of what stands around them; those of the released models where none are stated."""
    return {key: integer(hf, key, MAX_INT32, default=default, least=0) for key, default in released.items()}


def parse_model(hf: HfConfig, family: str, head_dim: int | None = 128, absent_kv_heads: int = 32) -> VlmConfig:
    """An HF config with a `text_config` of this decoder, whose mlps are dense.

    Args:
        hf: the config.
        family: name of the family.
        head_dim: what an absent `head_dim` means; None: the width divided by the number of heads.
        absent_kv_heads: what an absent `num_key_value_heads` means.

    Raises:
        ConfigError: a key is missing or asks for what is not computed.
    """
    text = needed(hf, "text_config")
    return VlmConfig(
        # As in transformers: what `text_config` says of the head counts for nothing.
        text=parse_text(text, flag(hf, "tie_word_embeddings"), head_dim, absent_kv_heads),
        vision=parse_vision(needed(hf, "vision_config")),
        **markers(hf),
        eos_token_ids=eos_ids(text, EOS_ID, TEXT),
        family=family,
    )


def parse_text(text: HfConfig, tied: bool, head_dim: int | None, absent_kv_heads: int) -> TextConfig:
    """The decoder: q/k norm, no qkv bias, M-RoPE whose frequencies take turns."""
    only(text, "hidden_act", ("silu",), TEXT)
    only(text, "attention_bias", (False,), TEXT)
    rope = section(text, "rope_scaling", TEXT) or section(text, "rope_parameters", TEXT)
    only({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", ("default",), TEXT)
    only(rope, "mrope_interleaved", (True,), TEXT)
    width = integer(text, "hidden_size", MAX_WIDTH, where=TEXT)
    heads = integer(text, "num_attention_heads", MAX_HEADS, where=TEXT)
    return TextConfig(
        vocab_size=integer(text, "vocab_size", MAX_VOCAB, where=TEXT),
        hidden_size=width,
        num_layers=integer(text, "num_hidden_layers", MAX_LAYERS, where=TEXT),
        num_heads=heads,
        num_kv_heads=kv_heads(text, absent_kv_heads, heads, TEXT),
        head_dim=integer(text, "head_dim", MAX_WIDTH, default=head_dim or width // heads, where=TEXT),
        mlp_size=integer(text, "intermediate_size", MAX_WIDTH, where=TEXT),
        rms_norm_eps=norm_eps(text, 1e-6, TEXT),
        rope_theta=rope_theta(text, rope, 5e5, TEXT),
        mrope_section=integers(rope, "mrope_section", MROPE_SECTION, TEXT),
        mrope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=tied,
        max_position=integer(text, "max_position_embeddings", MAX_INT32, default=128000, where=TEXT),
    )


def parse_vision(vision: HfConfig) -> TableTowerConfig:
    """The tower."""
    only(vision, "hidden_act", ("gelu_pytorch_tanh",), VISION)
    rope = section(vision, "rope_parameters", VISION)
    only(rope, "rope_type", ("axial", "default"), VISION)
    rows = integer(vision, "num_position_embeddings", MAX_SIDE**2, default=2304, where=VISION)
    side = math.isqrt(rows)
    if side**2 != rows:
        raise ConfigError(f"{VISION}: 'num_position_embeddings' is {rows}, expected a square number: the table is one")
    return TableTowerConfig(
        depth=integer(vision, "depth", MAX_LAYERS, default=27, where=VISION),
        hidden_size=integer(vision, "hidden_size", MAX_WIDTH, default=1152, where=VISION),
        num_heads=integer(vision, "num_heads", MAX_HEADS, default=16, where=VISION),
        mlp_size=integer(vision, "intermediate_size", MAX_WIDTH, default=4304, where=VISION),
        patch_size=integer(vision, "patch_size", MAX_SIDE, default=16, where=VISION),
        temporal_patch_size=integer(vision, "temporal_patch_size", MAX_SIDE, default=2, where=VISION),
        merge_size=integer(vision, "spatial_merge_size", MAX_SIDE, default=2, where=VISION),
        in_channels=integer(vision, "in_channels", MAX_SIDE, default=3, where=VISION),
        out_size=integer(vision, "out_hidden_size", MAX_WIDTH, default=3584, where=VISION),
        table_side=side,
        deep_blocks=integers(vision, "deepstack_visual_indexes", (8, 16, 24), VISION),
        rope_theta=rope_theta({}, rope, 1e4, VISION),
    )


def render_model(config: VlmConfig, architecture: str) -> dict[str, Any]:
    """An HF config as released ones are, which transformers 4 and 5 read."""
    text = config.text
    eos = config.eos_token_ids
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "tie_word_embeddings": text.tie_embeddings,
        **{key: getattr(config, key) for key in MARKER_IDS},
        "text_config": {
            "model_type": f"{config.family}_text",
            "hidden_act": "silu",
            "attention_bias": False,
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.mlp_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "max_position_embeddings": text.max_position,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": list(text.mrope_section),
            },
            "tie_word_embeddings": text.tie_embeddings,
            "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
        },
        "vision_config": render_vision(tower_of(config, TableTowerConfig), config.family),
    }


def render_vision(vision: TableTowerConfig, model_type: str) -> dict[str, Any]:
    """The `vision_config` that `parse_vision` reads."""
    return {
        "model_type": model_type,
        "hidden_act": "gelu_pytorch_tanh",
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "num_heads": vision.num_heads,
        "intermediate_size": vision.mlp_size,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "spatial_merge_size": vision.merge_size,
        "in_channels": vision.in_channels,
        "out_hidden_size": vision.out_size,
        "num_position_embeddings": vision.table_side**2,
        "deepstack_visual_indexes": list(vision.deep_blocks),
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
    }
