"""A SigLIP tower and a text model as one model of this family, in whose projector nothing is learned yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.hf import HfConfig, section
from rave_jax.families.joining import Join
from rave_jax.families.llava.config import ARCHITECTURE, MODEL_TYPE, TEXT_FAMILIES
from rave_jax.families.small import CHATML_TOKENS, chatml

START, IMAGE, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
TOWERS = ("siglip", "siglip_vision_model")
"""`model_type` of a checkpoint of both of SigLIP's encoders, and of its tower alone."""


def config(tower: HfConfig, text: HfConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """The HF config. The projector reads what the last block says of every patch.

    Raises:
        ConfigError: another tower, or a text model that the family does not have.
    """
    kind = tower.get("model_type")
    if kind not in TOWERS:
        expected = " or ".join(map(repr, TOWERS))
        raise ConfigError(f"the tower's config.json: 'model_type' is {kind!r}, expected {expected}")
    if text.get("model_type") not in TEXT_FAMILIES:
        found, expected = text.get("model_type"), " or ".join(map(repr, TEXT_FAMILIES))
        raise ConfigError(f"the text model's config.json: 'model_type' is {found!r}, expected {expected}")
    vision = section(tower, "vision_config") if kind == TOWERS[0] else tower
    vision = {key: value for key, value in vision.items() if key not in ("architectures", "transformers_version")}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "image_token_index": ids[IMAGE],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "text_config": dict(text),
        "vision_config": vision | {"model_type": TOWERS[1], "vision_use_head": False},
    }


def files(joined: HfConfig) -> dict[str, dict[str, Any]]:
    """What transformers' processor has to know."""
    return {
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": joined["vision_config"]["patch_size"],
            "vision_feature_select_strategy": joined["vision_feature_select_strategy"],
            "num_additional_image_tokens": 0,
        }
    }


JOIN = Join(
    config=config,
    tower="vision_tower.",
    text="language_model.",
    left_out=("text_model.", "logit_", "vision_model.head.", "vision_model.embeddings.position_ids"),
    tokens=(*CHATML_TOKENS, START, IMAGE, END),
    template=chatml(image=f"{START}{IMAGE}{END}"),
    files=files,
)
