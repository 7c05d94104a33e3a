"""Model families: a folder each, found by the `model_type` of a checkpoint's config.

Nothing here imports jax but the folders' `tower`, which is imported when a model is built.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable

from rave_jax.config import ConfigError
from rave_jax.families.base import Family, Original, TensorRule
from rave_jax.families.config import VlmConfig
from rave_jax.families.hf import HfConfig

__all__ = ["FAMILIES", "Family", "TensorRule", "family_for", "family_named", "original_of", "released"]

FOLDERS = (
    "qwen2_5_vl",
    "qwen2_vl",
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_vl_moe",
    "llava",
    "llava_onevision",
    "internvl",
    "smolvlm",
)
"""Where they are, in this folder. Small random models are of the first one if none is named."""

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (importlib.import_module(f"{__name__}.{name}").FAMILY for name in FOLDERS)
}
"""All families, by `model_type`."""


def family_named(model_type: str) -> Family:
    """The family of this name.

    Raises:
        ConfigError: no such family; names those there are.
    """
    if model_type not in FAMILIES:
        raise ConfigError(f"family is {model_type!r}, expected {' or '.join(map(repr, FAMILIES))}")
    return FAMILIES[model_type]


def released() -> dict[str, Callable[[], VlmConfig]]:
    """Folder name of a released checkpoint -> its shapes: what the presets of all families know."""
    presets = (f"{__name__}.{name}.presets" for name in FOLDERS)
    modules = (importlib.import_module(name) for name in presets if importlib.util.find_spec(name) is not None)
    return {name: shapes for module in modules for name, shapes in getattr(module, "RELEASED", {}).items()}


def original_of(hf_config: HfConfig) -> Original | None:
    """How a checkpoint with this config becomes HuggingFace's; None where it is in its layout already."""
    found = (family.original for family in FAMILIES.values())
    return next((one for one in found if one is not None and one.recognises(hf_config)), None)


def family_for(hf_config: HfConfig) -> Family:
    """The family of an HF config.

    Raises:
        ConfigError: its `model_type` is missing or unknown.
    """
    stated = hf_config.get("model_type")
    if (other := original_of(hf_config)) is not None:
        key = other.tower_key
        raise ConfigError(
            f"config.json: {key!r} is {hf_config[key]!r}: this is a checkpoint in the layout of its authors; "
            "`rave-jax convert from-original` makes a HuggingFace directory of it and of its tower's"
        )
    if isinstance(stated, str) and stated in FAMILIES:
        return FAMILIES[stated]
    found = "missing" if stated is None else repr(stated)
    near = difflib.get_close_matches(stated, FAMILIES, 1, 0.8) if isinstance(stated, str) else []
    # Alike in name, not in what they compute: no "did you mean".
    hint = f"; {near[0]} is another model, with other weights" if near else ""
    raise ConfigError(f"config.json: 'model_type' is {found}, supported are {', '.join(FAMILIES)}{hint}")
