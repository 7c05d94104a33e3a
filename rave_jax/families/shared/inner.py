"""The text decoder inside a model with pictures, whose `text_config` is a whole config of a text family."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.hf import HfConfig, flag, only, section

KEY = "text_config"


def parse_inner(hf: HfConfig, families: Sequence[str], tied: bool | None = None) -> tuple[TextConfig, tuple[int, ...]]:
    """The text decoder of an HF config, and the ids that end an answer.

    Args:
        hf: the whole config.
        families: text families that are computed; the first is what a config without `model_type` means.
        tied: is the embedding table the output head? None: it is where the whole config or `text_config` says so, as
            transformers reads configs of some models.

    Raises:
        ConfigError: the decoder is of another family, or asks for what is not computed.
    """
    # The registry imports every family, so it is imported when it is asked.
    from rave_jax.families import family_named

    stated = section(hf, KEY)
    where = f"config.json: {KEY}"
    only(stated, "model_type", tuple(families), where)
    family = family_named(stated.get("model_type", families[0]))
    try:
        config = family.parse(stated)
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.json", where, 1)) from error
    if tied is None:
        tied = config.text.tie_embeddings or flag(hf, "tie_word_embeddings")
    return dataclasses.replace(config.text, tie_embeddings=tied, family=family.model_type), config.eos_token_ids


def render_inner(config: VlmConfig) -> dict[str, Any]:
    """The `text_config` that `parse_inner` reads."""
    from rave_jax.families import family_named

    name = config.text.family
    inner = VlmConfig(text=config.text, eos_token_ids=config.eos_token_ids, family=name)
    return family_named(name).render(inner)
