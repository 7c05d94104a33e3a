"""The shapes of the model that a config trains: planning needs no weights, and no checkpoint that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.llava.presets import llava_1_5_7b, llava_1_5_13b
from rave_jax.families.qwen2_5_vl.config import VisionConfig
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_3b, qwen2_5_vl_7b
from rave_jax.families.qwen3_vl.presets import qwen3_vl_2b, qwen3_vl_4b, qwen3_vl_8b, qwen3_vl_32b
from rave_jax.families.qwen3_vl_moe.presets import qwen3_vl_30b_a3b, qwen3_vl_235b_a22b
from rave_jax.training.init import FromHF


def qwen2_5_vl_72b() -> VlmConfig:
    """Qwen2.5-VL-72B-Instruct, by its published sizes; its config.json was not at hand."""
    model = qwen2_5_vl_7b()
    text = dataclasses.replace(
        model.text, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_size=29568
    )
    tower = dataclasses.replace(tower_of(model, VisionConfig), out_size=8192, mlp_size=3456)
    return dataclasses.replace(model, text=text, vision=tower)


RELEASED: dict[str, Callable[[], VlmConfig]] = {
    "Qwen2.5-VL-3B-Instruct": qwen2_5_vl_3b,
    "Qwen2.5-VL-7B-Instruct": qwen2_5_vl_7b,
    "Qwen2.5-VL-72B-Instruct": qwen2_5_vl_72b,
    "Qwen3-VL-2B-Instruct": qwen3_vl_2b,
    "Qwen3-VL-4B-Instruct": qwen3_vl_4b,
    "Qwen3-VL-8B-Instruct": qwen3_vl_8b,
    "Qwen3-VL-32B-Instruct": qwen3_vl_32b,
    "Qwen3-VL-30B-A3B-Instruct": qwen3_vl_30b_a3b,
    "Qwen3-VL-235B-A22B-Instruct": qwen3_vl_235b_a22b,
    "llava-1.5-7b-hf": llava_1_5_7b,
    "llava-1.5-13b-hf": llava_1_5_13b,
}
"""Folder name of a released checkpoint -> its shapes."""


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
    if folder.name in RELEASED:
        return RELEASED[folder.name](), f"the released {folder.name}, since {folder} holds no config.json"
    raise ConfigError(
        f"init.path is {init.path!r}, expected a directory that holds a config.json (weights are not needed), or "
        f"one with the name of a released model: {', '.join(RELEASED)}"
    )
