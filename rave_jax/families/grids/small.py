"""What small random models of these families have in common: the decoder, the chat format and the settings files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rave_jax.families.config import TextConfig, TowerConfig, VlmConfig, tower_of
from rave_jax.families.grids.config import GridTowerConfig
from rave_jax.families.small import SmallSizes

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- macro written(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
      {%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
      {%- else -%}{{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' + written(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def model_config(
    sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int], vision: TowerConfig, family: str
) -> VlmConfig:
    """The model config around a tower. Half of the rotary frequencies turn with time, a quarter each (about) with
    height and width."""
    half = sizes.hidden_size // sizes.num_heads // 2
    side = math.ceil(half / 4) if half > 2 else half // 3
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.hidden_size // sizes.num_heads,
        mlp_size=sizes.mlp_size,
        mrope_section=(half - 2 * side, side, side),
        tie_embeddings=False,
    )
    return VlmConfig(
        text=text,
        vision=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]),
        family=family,
    )


def files(
    config: VlmConfig, ids: Mapping[str, int], rendered: dict[str, Any], processors: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """What its JSON files hold, by name.

    Args:
        config: the model's.
        ids: of the special tokens.
        rendered: its HF config.
        processors: names of the processors' classes in transformers, by the keys of their file.
    """
    vision = tower_of(config, GridTowerConfig)
    pad = ids["<|endoftext|>"]
    unit = (vision.patch_size * vision.merge_size) ** 2
    stated = {"bos_token_id": pad, "pad_token_id": pad}
    return {
        "config.json": rendered | {"dtype": "float32"} | stated,
        "generation_config.json": {**stated, "eos_token_id": list(config.eos_token_ids), "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.text.max_position,
        },
        "preprocessor_config.json": {
            **processors,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.merge_size,
            "min_pixels": unit,
            "max_pixels": 1024 * unit,
            "image_mean": list(vision.pixel_mean),
            "image_std": list(vision.pixel_std),
        },
    }
