"""Qwen3.5's config. Checked against transformers' `Qwen3_5ForConditionalGeneration`."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.hf import HfConfig, eos_ids, flag, needed, only
from rave_jax.families.shared.gated_delta import parse_text, render_text
from rave_jax.families.shared.position_table.config import TableTowerConfig
from rave_jax.families.shared.position_table.hf import TEXT, VISION, markers, parse_vision, render_vision

MODEL_TYPE, ARCHITECTURE = "qwen3_5", "Qwen3_5ForConditionalGeneration"
EOS_ID = 248044
MARKER_IDS = {
    "image_token_id": 248056,
    "video_token_id": 248057,
    "vision_start_token_id": 248053,
    "vision_end_token_id": 248054,
}
"""Ids of the released models, which a config may leave out."""
NO_BLOCKS = {"deepstack_visual_indexes": []}
"""The tower gives nothing to layers of the decoder."""


def parse(hf: HfConfig) -> VlmConfig:
    """An HF config to ours.

    Raises:
        ConfigError: a key is missing or asks for what this model does not compute.
    """
    text, vision = needed(hf, "text_config"), needed(hf, "vision_config")
    only(vision, "deepstack_visual_indexes", ([], None), VISION)
    return VlmConfig(
        # As in transformers: what `text_config` says of the head counts for nothing.
        text=parse_text(text, flag(hf, "tie_word_embeddings"), TEXT),
        vision=parse_vision({**vision, **NO_BLOCKS}),
        **markers(hf, MARKER_IDS),
        eos_token_ids=eos_ids(text, EOS_ID, TEXT),
        family=MODEL_TYPE,
    )


def render(config: VlmConfig) -> dict[str, Any]:
    """An HF config that `parse` and transformers read."""
    eos = config.eos_token_ids
    ends = {"eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "tie_word_embeddings": config.text.tie_embeddings,
        **{key: getattr(config, key) for key in MARKER_IDS},
        "text_config": {"model_type": f"{MODEL_TYPE}_text", **render_text(config.text), **ends},
        "vision_config": render_vision(tower_of(config, TableTowerConfig), MODEL_TYPE),
    }
