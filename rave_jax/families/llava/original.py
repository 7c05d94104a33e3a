"""Checkpoints in the layout of LLaVA's authors (LLaVA-1.5), which HuggingFace's config and keys are made of.

config.json is that of the decoder with keys `mm_...` for what is before it. The decoder and the projector have their
tensors in the directory; those of the CLIP tower lie in another, which `mm_vision_tower` names. The tokenizer has no
token for a picture, and the chat format is in the authors' code.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.base import Original, TensorSource
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.hf import HfConfig, integer, only, section
from rave_jax.families.llava.config import ARCHITECTURE, MODEL_TYPE
from rave_jax.families.llava.tensors import tensors
from rave_jax.families.shared.vit import VitConfig
from rave_jax.families.shared.vit_keys import DECODER, PROJECTOR, VISION

MODEL_TYPES = ("llava", "llava_llama")
TOWER = "mm_vision_tower"
DECODER_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
)
"""Keys of the decoder, which keep their names."""
INSIDE = "model.vision_tower.vision_tower.vision_model."
"""Where a tower that was trained too has its tensors in the directory itself."""
CLIP = "vision_model."
"""Where a whole CLIP model has them."""
LINEARS = {"linear_1": "0", "linear_2": "2"}
IGNORED = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")
"""Constants that transformers of then saved."""
TOKENS = ("<image>", "<pad>")
"""Tokens that are added behind the vocabulary."""

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
  {{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
  {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role != 'system' -%}{{- message.role.upper() + ': ' -}}{%- endif -%}
  {%- if message.content is string -%}{{- message.content -}}
  {%- else -%}
    {%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
    {%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
  {{- eos_token if message.role == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
"""The authors' format `vicuna_v1`."""


def recognises(hf: HfConfig) -> bool:
    """Is it the config of such a checkpoint?"""
    return hf.get("model_type") in MODEL_TYPES and TOWER in hf


def config(hf: HfConfig, tower: HfConfig, first_free: int) -> dict[str, Any]:
    """The HF config.

    Args:
        hf: config.json of the checkpoint.
        tower: that of the tower's directory.
        first_free: id that the first of `TOKENS` gets.

    Raises:
        ConfigError: a key asks for what is not computed.
    """
    only(hf, "mm_projector_type", ("mlp2x_gelu",))
    only(hf, "mm_use_im_start_end", (False,))
    only(hf, "mm_use_im_patch_token", (False,))
    only(hf, "mm_resampler_type", (None,))
    only(hf, "mm_patch_merge_type", ("flat",))
    only(hf, "mm_vision_select_feature", ("patch", "cls_patch"))
    only(hf, "image_aspect_ratio", ("square", "pad", None))
    if "mm_projector_type" not in hf:
        raise ConfigError("config.json: 'mm_projector_type' is missing, expected 'mlp2x_gelu'")
    vision = section(tower, "vision_config", "config.json of the tower") or tower
    kind = tower.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ConfigError(f"config.json of the tower: 'model_type' is {kind!r}, expected 'clip' or 'clip_vision_model'")
    width, found = integer(hf, "mm_hidden_size", 1 << 20, default=vision.get("hidden_size")), vision.get("hidden_size")
    if width != found:
        raise ConfigError(
            f"config.json of the tower: 'hidden_size' is {found}, expected {width}, the mm_hidden_size of the model"
        )
    rows = -(-(first_free + len(TOKENS)) // 64) * 64
    rows = max(rows, integer(hf, "vocab_size", 1 << 26))
    text = {key: hf[key] for key in DECODER_KEYS if hf.get(key) is not None}
    full = hf.get("mm_vision_select_feature", "patch") == "cls_patch"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "image_token_index": first_free,
        "pad_token_id": first_free + 1,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": hf.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if full else "default",
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings")),
        "text_config": {**text, "model_type": "llama", "vocab_size": rows},
        "vision_config": {**vision, "model_type": "clip_vision_model"},
    }


def sources(config: VlmConfig, own: Collection[str], tower: Collection[str]) -> dict[str, TensorSource]:
    """Where each tensor of the HF checkpoint is.

    Args:
        config: of the model.
        own: keys of the checkpoint's tensors.
        tower: keys of the tower's.
    """
    inside = any(key.startswith(INSIDE) for key in own)
    # transformers 5 saves a tower alone without the beginning that its keys have inside a whole CLIP model.
    beginning = CLIP if any(key.startswith(CLIP) for key in tower) else ""

    def source(key: str) -> TensorSource:
        if key.startswith(VISION):
            inner = key.removeprefix(VISION)
            return TensorSource(INSIDE + inner, False) if inside else TensorSource(beginning + inner, True)
        for theirs, ours in LINEARS.items():
            key = key.replace(f"{PROJECTOR}{theirs}", f"model.mm_projector.{ours}")
        return TensorSource(key.removeprefix(DECODER), False)

    return {rule.hf_key: source(rule.hf_key) for rule in tensors(config)}


def files(config: VlmConfig, hf: HfConfig) -> dict[str, dict[str, Any]]:
    """What the settings files hold that are not in the checkpoint, by name; the authors' code makes pictures square
    where `image_aspect_ratio` is pad."""
    vision = tower_of(config, VitConfig)
    return {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_pad": hf.get("image_aspect_ratio") == "pad",
            "do_resize": True,
            "size": {"shortest_edge": vision.image_size},
            "do_center_crop": True,
            "crop_size": {"height": vision.image_size, "width": vision.image_size},
            "resample": 3,
            "image_mean": list(vision.pixel_mean),
            "image_std": list(vision.pixel_std),
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": TOKENS[0],
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "full" if vision.class_feature else "default",
            "num_additional_image_tokens": 1,
        },
    }


ORIGINAL = Original(
    recognises=recognises,
    tower_key=TOWER,
    config=config,
    sources=sources,
    ignored=IGNORED,
    files=files,
    tokens=TOKENS,
    template=CHAT_TEMPLATE,
)
