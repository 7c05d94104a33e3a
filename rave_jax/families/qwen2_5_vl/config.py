"""Qwen2.5-VL's config. Checked against transformers' `Qwen2_5_VLForConditionalGeneration`.

Configs come in two styles: flat with `rope_scaling` (as released) and nested under `text_config` with
`rope_parameters` (as transformers 5 saves). Defaults of absent keys are those of transformers' config classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rave_jax.config import ConfigError, require
from rave_jax.families.config import (
    MAX_HEADS,
    MAX_INT32,
    MAX_LAYERS,
    MAX_SIDE,
    MAX_VOCAB,
    MAX_WIDTH,
    TextConfig,
    VlmConfig,
    check_norm_and_rope,
    within,
)
from rave_jax.families.grids.config import GridTowerConfig
from rave_jax.families.hf import (
    HfConfig,
    check_layer_types,
    eos_ids,
    flag,
    integer,
    integers,
    norm_eps,
    number,
    only,
    rope_theta,
    section,
)

MODEL_TYPE, ARCHITECTURE = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"
EOS_ID = 151645
MARKER_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
"""Ids of the released models, which a config may leave out."""


@dataclass(frozen=True)
class VisionConfig(GridTowerConfig):
    """The vision tower and the merger after it."""

    window_size: int = 112
    """Side of an attention window in pixels."""
    full_attention_blocks: tuple[int, ...] = (1,)
    """Blocks that attend over the whole frame; the others stay inside windows."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm of the tower."""
    rope_theta: float = 1e4
    """Base of the rotary frequencies of rows and columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, {"window_size": MAX_WIDTH})
        unit = self.unit_size
        require(self.window_size >= unit, "window_size", self.window_size, f"at least one merge unit of {unit} pixels")
        known = all(0 <= n < self.depth for n in self.full_attention_blocks)
        require(known, "full_attention_blocks", self.full_attention_blocks, f"numbers from 0 to {self.depth - 1}")
        check_norm_and_rope(self)

    @property
    def window_units(self) -> int:
        """Merge units along the side of a window: as many whole ones as fit in window_size."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """The most patches a window can hold; a row's number of patches is a multiple of it."""
        return (self.window_units * self.merge_size) ** 2


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    nested = section(hf, "text_config")
    text, where = (nested, "config.json: text_config") if nested else (hf, "config.json")
    vision = section(hf, "vision_config")
    if not vision:
        raise ConfigError("config.json: 'vision_config' is missing")
    # As in transformers: the head is tied where either of the two places says so.
    tied = flag(hf, "tie_word_embeddings") or flag(text, "tie_word_embeddings", where)
    return VlmConfig(
        text=_parse_text(text, tied, where),
        vision=_parse_vision(vision),
        **{key: integer(hf, key, MAX_INT32, default=default, least=0) for key, default in MARKER_IDS.items()},
        eos_token_ids=eos_ids(text, EOS_ID, where),
        tokens_per_second=number(vision, "tokens_per_second", 4, 1e-6, 1e6, "config.json: vision_config"),
        family=MODEL_TYPE,
    )


def _parse_text(text: HfConfig, tied: bool, where: str) -> TextConfig:
    only(text, "hidden_act", ("silu",), where)
    rope = section(text, "rope_scaling", where) or section(text, "rope_parameters", where)
    only({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", ("default", "mrope"), where)
    D = integer(text, "hidden_size", MAX_WIDTH, where=where)
    H = integer(text, "num_attention_heads", MAX_HEADS, where=where)
    if D % H:
        raise ConfigError(f"{where}: 'hidden_size' is {D}, expected a multiple of num_attention_heads {H}")
    windowed = flag(text, "use_sliding_window", where)
    window = integer(text, "sliding_window", MAX_INT32, default=4096, where=where)
    first = integer(text, "max_window_layers", MAX_INT32, default=80, least=0, where=where)
    config = TextConfig(
        vocab_size=integer(text, "vocab_size", MAX_VOCAB, where=where),
        hidden_size=D,
        num_layers=integer(text, "num_hidden_layers", MAX_LAYERS, where=where),
        num_heads=H,
        num_kv_heads=integer(text, "num_key_value_heads", MAX_HEADS, default=H, where=where),
        head_dim=D // H,
        mlp_size=integer(text, "intermediate_size", MAX_WIDTH, where=where),
        rms_norm_eps=norm_eps(text, 1e-5, where),
        rope_theta=rope_theta(text, rope, 1e6, where),
        mrope_section=integers(rope, "mrope_section", (16, 24, 24), where),
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=tied,
        sliding_window=window if windowed and text.get("sliding_window", 4096) is not None else None,
        window_from=first if windowed else 0,
        max_position=integer(text, "max_position_embeddings", MAX_INT32, default=32768, where=where),
    )
    check_layer_types(text, config, where)
    return config


def _parse_vision(vision: HfConfig) -> VisionConfig:
    where = "config.json: vision_config"
    only(vision, "hidden_act", ("silu",), where)
    rope = section(vision, "rope_parameters", where)
    only(rope, "rope_type", ("axial", "default"), where)
    return VisionConfig(
        depth=integer(vision, "depth", MAX_LAYERS, where=where),
        hidden_size=integer(vision, "hidden_size", MAX_WIDTH, where=where),
        num_heads=integer(vision, "num_heads", MAX_HEADS, where=where),
        mlp_size=integer(vision, "intermediate_size", MAX_WIDTH, where=where),
        patch_size=integer(vision, "patch_size", MAX_SIDE, default=14, where=where),
        temporal_patch_size=integer(vision, "temporal_patch_size", MAX_SIDE, default=2, where=where),
        merge_size=integer(vision, "spatial_merge_size", MAX_SIDE, default=2, where=where),
        window_size=integer(vision, "window_size", MAX_WIDTH, default=112, where=where),
        full_attention_blocks=integers(vision, "fullatt_block_indexes", (7, 15, 23, 31), where),
        in_channels=integer(vision, "in_channels", MAX_SIDE, default=3, where=where),
        out_size=integer(vision, "out_hidden_size", MAX_WIDTH, where=where),
        rope_theta=rope_theta({}, rope, 1e4, where),
    )


def tower_of(config: VlmConfig) -> VisionConfig:
    """The config of the tower.

    Raises:
        ConfigError: the model has none, or another family's.
    """
    if not isinstance(config.vision, VisionConfig):
        found = type(config.vision).__name__
        raise ConfigError(f"vision is {found}, expected a VisionConfig of {MODEL_TYPE}: its models have a tower")
    return config.vision


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config, flat as the released ones, which transformers 4 and 5 read."""
    text, vision = config.text, tower_of(config)
    windowed = text.sliding_window is not None
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.mlp_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "max_position_embeddings": text.max_position,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "tie_word_embeddings": text.tie_embeddings,
        "use_sliding_window": windowed,
        "sliding_window": text.sliding_window,
        "max_window_layers": text.window_from if windowed else text.num_layers,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "eos_token_id": config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids),
        "vision_config": {
            "model_type": MODEL_TYPE,
            "hidden_act": "silu",
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.mlp_size,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
            "in_channels": vision.in_channels,
            "out_hidden_size": vision.out_size,
            "tokens_per_second": _whole(config.tokens_per_second),
        },
    }


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value
