"""LLaVA's config. Checked against transformers' `LlavaForConditionalGeneration`.

Defaults of absent keys are those of transformers' `LlavaConfig`, except in `vision_config`, whose sizes have to be
there.
"""

from __future__ import annotations

from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.config import MAX_INT32, VlmConfig, tower_of
from rave_jax.families.hf import HfConfig, integer, needed, only
from rave_jax.families.shared.inner import parse_inner, render_inner
from rave_jax.families.shared.vit import VitConfig, feature_layers, parse_vit, render_feature_layers, render_vit

MODEL_TYPE, ARCHITECTURE = "llava", "LlavaForConditionalGeneration"
TEXT_FAMILIES = ("llama", "qwen2", "qwen3")
IMAGE_TOKEN_ID = 32000
"""Id of `<image>` in the released models, which a config may leave out."""
FEATURE_LAYER = -2
"""`vision_feature_layer` of a config that leaves it out."""


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    vision = needed(hf, "vision_config")
    only(hf, "projector_hidden_act", ("gelu",))
    only(hf, "multimodal_projector_bias", (True, False))
    only(hf, "vision_feature_select_strategy", ("default", "full"))
    text, eos = parse_inner(hf, TEXT_FAMILIES)
    fields = parse_vit(vision, "config.json: vision_config")
    full = hf.get("vision_feature_select_strategy", "default") == "full"
    if fields["kind"] == "siglip" and not full:
        raise ConfigError(
            "config.json: 'vision_feature_select_strategy' is 'default', which leaves out the first token of a "
            "picture, expected 'full': a SigLIP tower has no class token"
        )
    tower = VitConfig(
        **fields,
        out_size=text.hidden_size,
        feature_layers=feature_layers(hf.get("vision_feature_layer", FEATURE_LAYER), fields["depth"]),
        class_feature=full and fields["kind"] == "clip",
        projector_bias=hf.get("multimodal_projector_bias", True),
    )
    key = "image_token_id" if hf.get("image_token_id") is not None else "image_token_index"
    return VlmConfig(
        text=text,
        vision=tower,
        image_token_id=integer(hf, key, MAX_INT32, default=IMAGE_TOKEN_ID, least=0),
        eos_token_ids=eos,
        family=MODEL_TYPE,
    )


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    tower = tower_of(config, VitConfig)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "image_token_index": config.image_token_id,
        "image_seq_length": tower.side**2 + tower.class_feature,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": tower.projector_bias,
        "vision_feature_layer": render_feature_layers(tower),
        "vision_feature_select_strategy": "default" if tower.class_token and not tower.class_feature else "full",
        "tie_word_embeddings": config.text.tie_embeddings,
        "text_config": render_inner(config),
        "vision_config": render_vit(tower),
    }
