"""Small checkpoints written by safetensors itself, so that our reader and writer have an outside judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rave_jax.families import family_named
from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen2_5_vl.presets import tiny

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]


def tensors_of(config: VlmConfig, seed: int = 0, dtype: type = np.float32) -> Tensors:
    """Random numbers for every tensor of the family's table."""
    rng = np.random.default_rng(seed)
    rules = family_named(config.family).tensors(config)
    return {rule.hf_key: rng.standard_normal(rule.shape, np.float32).astype(dtype) for rule in rules}


def save(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """The weight files, and the index of several."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    keys = sorted(tensors)
    where = {key: f"model-{1 + n % shards:05d}-of-{shards:05d}.safetensors" for n, key in enumerate(keys)}
    for name in set(where.values()):
        save_file({k: tensors[k] for k in keys if where[k] == name}, folder / name, metadata={"format": "pt"})
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def config() -> VlmConfig:
    """Three decoder layers, one window and one full block in the tower, an untied head."""
    return tiny(vocab_size=64, tie_embeddings=False)


@pytest.fixture
def write(tmp_path: Path, config: VlmConfig) -> Write:
    """write(edit=..., shards=..., bfloat16=..., other_style=..., config=...): a checkpoint folder."""

    def make(
        edit: Callable[[Tensors], object] | None = None,
        shards: int = 1,
        bfloat16: bool = False,
        other_style: bool = False,
        config: VlmConfig = config,
        name: str = "source",
    ) -> Path:
        family = family_named(config.family)
        tensors = tensors_of(config, dtype=ml_dtypes.bfloat16 if bfloat16 else np.float32)
        if edit is not None:
            edit(tensors)
        if other_style:
            tensors = {family.other_key(key): value for key, value in tensors.items()}
        folder = tmp_path / name
        folder.mkdir()
        # Odd spacing: what is carried along byte for byte must not be parsed and written again.
        (folder / "config.json").write_text(json.dumps(family.render(config), indent=3))
        (folder / "tokenizer_config.json").write_text("{ }")
        save(folder, tensors, shards)
        return folder

    return make
