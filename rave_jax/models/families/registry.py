"""All families, one line each."""

from __future__ import annotations

from rave_jax.config import ConfigError
from rave_jax.models.families import qwen2_5_vl, qwen3
from rave_jax.models.families.base import Family, HfConfig

FAMILIES = {family.model_type: family for family in (qwen2_5_vl.FAMILY, qwen3.FAMILY)}


def family_named(model_type: str) -> Family:
    """The family of this name.

    Raises:
        ConfigError: no such family; names those there are.
    """
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type is {model_type!r}, expected {' or '.join(map(repr, FAMILIES))}")
    return FAMILIES[model_type]


def family_for(hf_config: HfConfig) -> Family:
    """The family of an HF config.

    Raises:
        ConfigError: its `model_type` is missing or unknown.
    """
    return family_named(hf_config.get("model_type", ""))
