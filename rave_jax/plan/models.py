"""The shapes of the model that a config trains: planning needs no weights, and no checkpoint that is there."""

from __future__ import annotations

from pathlib import Path

from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.config import ConfigError
from rave_jax.families import released
from rave_jax.families.config import VlmConfig
from rave_jax.training.init import FromHF


def model_of(init: FromHF | Tiny) -> tuple[VlmConfig, str]:
    """The model of a config, and where its shapes are from, in words.

    Raises:
        ConfigError: there is no config.json, and the folder has not the name of a released model whose shapes we know.
    """
    if isinstance(init, Tiny):
        return tiny_config(init), "the config's own sizes"
    folder = Path(init.path).expanduser()
    if (folder / "config.json").is_file():
        return load_config(folder)[0], str(folder / "config.json")
    known = released()
    if folder.name in known:
        return known[folder.name](), f"the released {folder.name}, since {folder} holds no config.json"
    raise ConfigError(
        f"init.path is {init.path!r}, expected a directory that holds a config.json (weights are not needed), or "
        f"one with the name of a released model: {', '.join(known)}"
    )
