"""What makes a small random model of this family a whole HF directory: its config, chat format and settings files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.llava.config import MODEL_TYPE, render
from rave_jax.families.shared.vit import VitConfig
from rave_jax.families.small import SmallModels, SmallSizes, small_text

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
SIDE = 4
"""Patches along the side of a picture."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message.role != 'system' -%}{{- message.role.upper() + ': ' -}}{%- endif -%}
  {%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
  {%- for part in message.content if part.type == 'text' -%}
    {%- if message.role == 'assistant' -%}
      {%- generation -%}{{- part.text + ' ' -}}{%- endgeneration -%}
    {%- else -%}{{- part.text + ' ' -}}
    {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
"""In the format of the released models, which put no token behind an answer."""


def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
    """The model config. The tower is read before its last block."""
    text = small_text(
        sizes, vocab_size, rms_norm_eps=1e-5, rope_theta=1e4, qkv_bias=False, max_position=4096, family="llama"
    )
    vision = VitConfig(
        depth=sizes.vision_layers,
        hidden_size=sizes.vision_hidden_size,
        num_heads=sizes.vision_heads,
        mlp_size=sizes.vision_mlp_size,
        patch_size=sizes.patch_size,
        image_size=SIDE * sizes.patch_size,
        feature_layers=(max(sizes.vision_layers - 1, 0),),
        out_size=sizes.hidden_size,
    )
    return VlmConfig(
        text=text,
        vision=vision,
        image_token_id=ids["<image>"],
        eos_token_ids=(ids["</s>"],),
        family=MODEL_TYPE,
    )


def files(config: VlmConfig, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What its JSON files hold, by name."""
    vision = tower_of(config, VitConfig)
    stated = {"bos_token_id": ids["<s>"], "pad_token_id": ids["<pad>"]}
    size = {"height": vision.image_size, "width": vision.image_size}
    return {
        "config.json": render(config) | {"dtype": "float32"} | stated,
        "generation_config.json": {**stated, "eos_token_id": list(config.eos_token_ids), "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "additional_special_tokens": ["<image>"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.text.max_position,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_resize": True,
            "size": {"shortest_edge": vision.image_size},
            "do_center_crop": True,
            "crop_size": size,
            "resample": 3,
            "image_mean": list(vision.pixel_mean),
            "image_std": list(vision.pixel_std),
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "full" if vision.class_feature else "default",
            "num_additional_image_tokens": 1,
        },
    }


SMALL = SmallModels(SPECIAL_TOKENS, config, files, leading="<s>")
