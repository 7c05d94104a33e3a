"""What HF configs of these families have in common: the text decoder with M-RoPE, and the ids of placeholders.

Configs come in two styles: flat with `rope_scaling` (as released) and nested under `text_config` with
`rope_parameters` (as transformers 5 saves). Defaults of absent keys are those of transformers' config classes.
"""

from __future__ import annotations

from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.config import (
    MAX_HEADS,
    MAX_INT32,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    TextConfig,
    VlmConfig,
)
from rave_jax.families.hf import (
    HfConfig,
    check_layer_types,
    eos_ids,
    flag,
    integer,
    integers,
    kv_heads,
    norm_eps,
    only,
    rope_theta,
    section,
)
from rave_jax.families.shared.grids.config import GridTowerConfig

EOS_ID = 151645
MARKER_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
"""Ids of the released models, which a config may leave out."""
KV_HEADS = 8
"""Of a config that does not say it."""
VISION = "config.json: vision_config"
PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
"""Keys as transformers 5 saves them, and as released."""


def parse_model(hf: HfConfig, vision: GridTowerConfig, family: str, tokens_per_second: float = 2.0) -> VlmConfig:
    """The config of a model with this tower.

    Raises:
        ConfigError: a key is missing or asks for what this decoder does not compute.
    """
    nested = section(hf, "text_config")
    text, where = (nested, "config.json: text_config") if nested else (hf, "config.json")
    # As in transformers: the head is tied where either of the two places says so.
    tied = flag(hf, "tie_word_embeddings") or flag(text, "tie_word_embeddings", where)
    return VlmConfig(
        text=_parse_text(text, tied, where),
        vision=vision,
        **{key: integer(hf, key, MAX_INT32, default=default, least=0) for key, default in MARKER_IDS.items()},
        eos_token_ids=eos_ids(text, EOS_ID, where),
        tokens_per_second=tokens_per_second,
        family=family,
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
        num_kv_heads=kv_heads(text, KV_HEADS, H, where),
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


def render_model(config: VlmConfig, architecture: str, vision: dict[str, Any]) -> dict[str, Any]:
    """An HF config, flat as the released ones, which transformers 4 and 5 read.

    Args:
        config: the model's.
        architecture: its class in transformers.
        vision: its `vision_config`.
    """
    text = config.text
    windowed = text.sliding_window is not None
    return {
        "architectures": [architecture],
        "model_type": config.family,
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
        "vision_config": vision,
    }
