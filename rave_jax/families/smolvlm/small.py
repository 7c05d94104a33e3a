"""What makes a small random model of this family a whole HF directory: its config, chat format and settings files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.small import SmallModels, SmallSizes, model_files, small_text
from rave_jax.families.smolvlm.config import MODEL_TYPE, VisionConfig, render

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)),
)
SIDE = 2
"""Visual tokens along the side of a tile."""

CHAT_TEMPLATE = """\
<|im_start|>
{%- for message in messages -%}
  {{- message.role | capitalize -}}
  {%- if message.content is string -%}{{- ': ' + message.content -}}
  {%- else -%}
    {%- if message.content[0].type == 'image' -%}:{%- else -%}{{- ': ' -}}{%- endif -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}<image>{%- else -%}{{- part.text -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""


def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
    """The model config."""
    vision = VisionConfig(
        depth=sizes.vision_layers,
        hidden_size=sizes.vision_hidden_size,
        num_heads=sizes.vision_heads,
        mlp_size=sizes.vision_mlp_size,
        patch_size=sizes.patch_size,
        merge_size=sizes.merge_size,
        image_size=SIDE * sizes.merge_size * sizes.patch_size,
        kind="siglip",
        activation="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        feature_layers=(sizes.vision_layers,),
        projector_bias=False,
        out_size=sizes.hidden_size,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    )
    return VlmConfig(
        text=small_text(sizes, vocab_size, family="llama", qkv_bias=False, rms_norm_eps=1e-5, rope_theta=1e5),
        vision=vision,
        image_token_id=ids["<image>"],
        eos_token_ids=(ids["<end_of_utterance>"],),
        family=MODEL_TYPE,
    )


def files(config: VlmConfig, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What its JSON files hold, by name."""
    vision = tower_of(config, VisionConfig)
    stated = model_files(render(config), config.eos_token_ids, ids, CHAT_TEMPLATE, config.text.max_position)
    stated["tokenizer_config.json"] |= {"eos_token": "<end_of_utterance>"}
    shared = {
        "processor_class": "SmolVLMProcessor",
        "max_image_size": {"longest_edge": vision.image_size},
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
    return stated | {
        "preprocessor_config.json": {
            "image_processor_type": "SmolVLMImageProcessor",
            "do_image_splitting": True,
            "size": {"longest_edge": 3 * vision.image_size},
            **shared,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "SmolVLMVideoProcessor",
            "do_sample_frames": True,
            "num_frames": 16,
            "fps": 2,
            "size": {"longest_edge": 2 * vision.image_size},
            **shared,
        },
        "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": vision.token_side**2},
    }


SMALL = SmallModels(SPECIAL_TOKENS, config, files)
