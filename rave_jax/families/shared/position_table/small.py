"""What small random models of these families have in common: the decoder, the tower and the settings files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.shared.grids import small
from rave_jax.families.shared.position_table.config import TableTowerConfig
from rave_jax.families.small import SmallModels, SmallSizes

DEEP = 3
"""Blocks that give features for the decoder, where there are as many and as many decoder layers."""


def small_models(
    family: str, render: Callable[[VlmConfig], dict[str, Any]], images: dict[str, str], videos: dict[str, str]
) -> SmallModels:
    """Small models of a family with this decoder.

    Args:
        family: its name.
        render: our config to an HF config.
        images, videos: names of the processors' classes in transformers, by the keys of their files.
    """

    def config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int]) -> VlmConfig:
        return model_config(sizes, vocab_size, ids, family)

    def files(config: VlmConfig, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        return small.files(config, ids, render(config), images) | video_file(config, videos)

    return SmallModels(small.SPECIAL_TOKENS, config, files)


def model_config(sizes: SmallSizes, vocab_size: int, ids: Mapping[str, int], family: str) -> VlmConfig:
    """The model config."""
    vision = tower(sizes, min(DEEP, sizes.num_layers, sizes.vision_layers))
    made = small.model_config(sizes, vocab_size, ids, vision, family)
    text = dataclasses.replace(made.text, mrope_interleaved=True, qkv_bias=False, qk_norm=True)
    return dataclasses.replace(made, text=text)


def tower(sizes: SmallSizes, deep: int) -> TableTowerConfig:
    """The tower, whose first `deep` blocks give features for the decoder."""
    return TableTowerConfig(
        depth=sizes.vision_layers,
        hidden_size=sizes.vision_hidden_size,
        num_heads=sizes.vision_heads,
        mlp_size=sizes.vision_mlp_size,
        patch_size=sizes.patch_size,
        merge_size=sizes.merge_size,
        out_size=sizes.hidden_size,
        deep_blocks=tuple(range(deep)),
    )


def video_file(config: VlmConfig, videos: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The settings file of videos, by name."""
    vision = tower_of(config, TableTowerConfig)
    unit = (vision.patch_size * vision.merge_size) ** 2
    return {
        "video_preprocessor_config.json": {
            **videos,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.merge_size,
            "size": {"shortest_edge": unit, "longest_edge": 4096 * unit},
            "image_mean": list(vision.pixel_mean),
            "image_std": list(vision.pixel_std),
        }
    }
