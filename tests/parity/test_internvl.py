"""Towers of InternVL of the other kind, that of InternViT-6B: its norms, and no embedding of places."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.tiny import Tiny, write_tiny_files
from rave_jax.data.collate import collate, smallest_shape
from rave_jax.data.processor import Processor
from rave_jax.models.config import ModelOptions
from tests.parity.test_families import LIMIT, SCRIPT, SIZES, Case, conversations, with_files

pytestmark = pytest.mark.parity
KINDS: dict[str, dict[str, Any]] = {
    "norms": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "hidden_act": "quick_gelu"},
    "places": {"use_absolute_position_embeddings": False, "use_mean_pooling": False, "layer_scale_init_value": 1.0},
}


@pytest.fixture(scope="module")
def folder(torch_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internvl")
    cases = []
    for name, changes in KINDS.items():
        own = folder / name
        own.mkdir()
        write_tiny_files(own, Tiny(**{**SIZES, "family": "internvl", "patch_size": 8}))
        config = json.loads((own / "config.json").read_text())
        config["vision_config"] |= changes
        (own / "config.json").write_text(json.dumps(config))
        asked = conversations(Case("internvl", pictures=(((40, 70),),)), own)
        cases.append({"name": name, "seed": 3, "new": 1, "conversations": asked})
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run([torch_python, str(SCRIPT), "start", str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(folder: Path, kind: str) -> None:
    own = folder / kind
    processor, model = Processor.from_hf(own), import_hf(own, ModelOptions())
    (messages,) = json.loads((folder / "cases.json").read_text())[list(KINDS).index(kind)]["conversations"]
    example = processor.encode(with_files(messages, own), add_generation_prompt=True)
    sizes = processor.rules.patch_sizes
    batch = collate([[example]], smallest_shape([[example]], 1, sizes.window), sizes)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(model.logits(model.forward(batch).hidden))[0]
    theirs = np.load(folder / f"{kind}.npz")["logits0"]
    assert np.abs(theirs).max() > 0.5
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= LIMIT
