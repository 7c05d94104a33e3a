"""Qwen2.5-VL (arXiv 2502.13923). Checked against transformers' `Qwen2_5_VLForConditionalGeneration`.

Configs come in two styles: flat with `rope_scaling` (as released) and nested under `text_config` with
`rope_parameters` (as transformers 5 saves). Defaults of absent keys are those of transformers' config classes.
"""

from __future__ import annotations

from typing import Any

from rave_jax.config import ConfigError
from rave_jax.models.config import TextConfig, VisionConfig, VlmConfig
from rave_jax.models.families.base import (
    Family,
    HfConfig,
    TensorRule,
    check_layer_types,
    decoder_tensors,
    eos_ids,
    need,
    only,
)


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    text = hf.get("text_config") or hf
    return VlmConfig(
        text=_parse_text(text, tied=bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings"))),
        vision=_parse_vision(need(hf, "vision_config")),
        image_token_id=hf.get("image_token_id", 151655),
        video_token_id=hf.get("video_token_id", 151656),
        vision_start_token_id=hf.get("vision_start_token_id", 151652),
        vision_end_token_id=hf.get("vision_end_token_id", 151653),
        eos_token_ids=eos_ids(text, 151645),
        tokens_per_second=float(hf["vision_config"].get("tokens_per_second", 4)),
        family=FAMILY.model_type,
    )


def _parse_text(text: HfConfig, tied: bool) -> TextConfig:
    only(text, "hidden_act", ("silu",))
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    only({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", ("default", "mrope"))
    D, H = need(text, "hidden_size"), need(text, "num_attention_heads")
    if D % H:
        raise ConfigError(f"config.json: 'hidden_size' is {D}, expected a multiple of num_attention_heads {H}")
    windowed = bool(text.get("use_sliding_window"))
    config = TextConfig(
        vocab_size=need(text, "vocab_size"),
        hidden_size=D,
        num_layers=need(text, "num_hidden_layers"),
        num_heads=H,
        num_kv_heads=text.get("num_key_value_heads") or H,
        head_dim=D // H,
        mlp_size=need(text, "intermediate_size"),
        rms_norm_eps=text.get("rms_norm_eps", 1e-5),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
        mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=tied,
        sliding_window=text.get("sliding_window", 4096) if windowed else None,
        window_from=text.get("max_window_layers", 80) if windowed else 0,
        max_position=text.get("max_position_embeddings", 32768),
    )
    check_layer_types(text, config)
    return config


def _parse_vision(vision: HfConfig) -> VisionConfig:
    where = "config.json: vision_config"
    only(vision, "hidden_act", ("silu",), where)
    rope = vision.get("rope_parameters") or {}
    only(rope, "rope_type", ("axial", "default"), where)
    return VisionConfig(
        depth=need(vision, "depth", where),
        hidden_size=need(vision, "hidden_size", where),
        num_heads=need(vision, "num_heads", where),
        mlp_size=need(vision, "intermediate_size", where),
        patch_size=vision.get("patch_size", 14),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        merge_size=vision.get("spatial_merge_size", 2),
        window_size=vision.get("window_size", 112),
        full_attention_blocks=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        in_channels=vision.get("in_channels", 3),
        out_size=need(vision, "out_hidden_size", where),
        rope_theta=float(rope.get("rope_theta", 1e4)),
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
            "tokens_per_second": int(config.tokens_per_second),
        },
    }


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
