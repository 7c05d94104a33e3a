"""Qwen2.5-VL (arXiv 2502.13923). Checked against transformers' `Qwen2_5_VLForConditionalGeneration`.

Configs come in two styles: flat with `rope_scaling` (as released) and nested under `text_config` with
`rope_parameters` (as transformers 5 saves). Defaults of absent keys are those of transformers' config classes.
"""

from __future__ import annotations

from typing import Any

from rave_jax.config import ConfigError
from rave_jax.models.config import (
    MAX_HEADS,
    MAX_INT32,
    MAX_LAYERS,
    MAX_SIDE,
    MAX_VOCAB,
    MAX_WIDTH,
    TextConfig,
    VisionConfig,
    VlmConfig,
)
from rave_jax.models.families.base import (
    Family,
    HfConfig,
    TensorRule,
    check_layer_types,
    decoder_tensors,
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

MARKER_IDS = {"image": 151655, "video": 151656, "vision_start": 151652, "vision_end": 151653}


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
    ids = {f"{name}_token_id": default for name, default in MARKER_IDS.items()}
    return VlmConfig(
        text=_parse_text(text, tied, where),
        vision=_parse_vision(vision),
        **{key: integer(hf, key, MAX_INT32, default=default, least=0) for key, default in ids.items()},
        eos_token_ids=eos_ids(text, 151645, where),
        tokens_per_second=number(vision, "tokens_per_second", 4, 1e-6, 1e6, "config.json: vision_config"),
        family=FAMILY.model_type,
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


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config, flat as the released ones, which transformers 4 and 5 read."""
    text, vision = config.text, config.vision
    assert vision is not None
    windowed = text.sliding_window is not None
    return {
        "architectures": [FAMILY.architecture],
        "model_type": FAMILY.model_type,
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
            "model_type": FAMILY.model_type,
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


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released index files."""
    assert config.vision is not None
    return (*_vision_tensors(config.vision), *decoder_tensors(config))


def _vision_tensors(vision: VisionConfig) -> list[TensorRule]:
    D, F, joined, p = vision.hidden_size, vision.mlp_size, vision.hidden_size * vision.merge_unit, vision.patch_size
    patch = (D, vision.in_channels, vision.temporal_patch_size, p, p)
    rules = [TensorRule("visual.patch_embed.proj.weight", "vision.patch.weight", None, None, patch)]
    for n in range(vision.depth):
        linears = {
            "attn.qkv": ("attention.qkv", 3 * D, D),
            "attn.proj": ("attention.output", D, D),
            "mlp.gate_proj": ("mlp.gate", F, D),
            "mlp.up_proj": ("mlp.up", F, D),
            "mlp.down_proj": ("mlp.down", D, F),
        }
        for key, (path, out, into) in linears.items():
            key = f"visual.blocks.{n}.{key}"
            rules.append(TensorRule(f"{key}.weight", f"{path}.weight", n, "vision", (out, into)))
            rules.append(TensorRule(f"{key}.bias", f"{path}.bias", n, "vision", (out,)))
        for key, path in (("norm1", "attention_norm"), ("norm2", "mlp_norm")):
            rules.append(TensorRule(f"visual.blocks.{n}.{key}.weight", f"{path}.weight", n, "vision", (D,)))
    rules.append(TensorRule("visual.merger.ln_q.weight", "vision.merger.norm.weight", None, None, (D,)))
    for key, path, out in (("mlp.0", "first", joined), ("mlp.2", "second", vision.out_size)):
        key, path = f"visual.merger.{key}", f"vision.merger.{path}"
        rules.append(TensorRule(f"{key}.weight", f"{path}.weight", None, None, (out, joined)))
        rules.append(TensorRule(f"{key}.bias", f"{path}.bias", None, None, (out,)))
    return rules


FAMILY = Family(
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    parse=parse,
    render=render,
    tensors=tensors,
    prefixes=(("model.visual.", "visual."), ("model.language_model.", "model.")),
)
