"""LLaVA with other towers and projectors than the released one, against transformers.

`test_families.py` has the model as released: CLIP, one layer, no class token.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rave_jax.checkpoint.tiny import Tiny, write_tiny_files
from tests.parity import test_families as families

pytestmark = [pytest.mark.parity, pytest.mark.slow]
SIGLIP = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
VARIANTS: dict[str, dict[str, Any]] = {
    "layers side by side and the class token": {
        "config.json": {
            "vision_feature_layer": [-3, -1, 1],
            "vision_feature_select_strategy": "full",
            "multimodal_projector_bias": False,
        },
        "processor_config.json": {"vision_feature_select_strategy": "full"},
    },
    "siglip and qwen2": {
        "config.json": {
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_config": {**SIGLIP, "vision_use_head": False},
            "text_config": {"model_type": "qwen2"},
        },
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 28, "width": 28},
            "do_center_crop": None,
            "crop_size": None,
        },
        "processor_config.json": {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
    },
}


def changed(stated: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The object with these keys changed, those of inner objects one by one."""
    objects = {key: value for key, value in changes.items() if isinstance(value, dict) and "model_type" in value}
    inner = {key: changed(stated[key], value) for key, value in objects.items()}
    return stated | changes | inner


@pytest.fixture(scope="module")
def folder(torch_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the variants and what transformers makes of them."""
    folder = tmp_path_factory.mktemp("llava")
    cases = []
    for seed, (name, files) in enumerate(VARIANTS.items()):
        own = folder / name
        own.mkdir()
        write_tiny_files(own, Tiny(**families.SIZES | {"family": "llava", "vision_layers": 3}))
        for file, changes in files.items():
            (own / file).write_text(json.dumps(changed(json.loads((own / file).read_text()), changes)))
        asked = families.conversations(families.Case("llava"), own)
        cases.append({"name": name, "seed": seed, "new": 2, "conversations": asked})
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run([torch_python, str(families.SCRIPT), "start", str(folder)], check=True, timeout=600)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_logits_are_those_of_transformers(
    folder: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.CASES, variant, families.Case("llava"))
    families.test_tokens_and_logits_are_those_of_transformers(folder, variant)
