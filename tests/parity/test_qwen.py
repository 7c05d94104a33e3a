"""Logits of random small checkpoints made by transformers, against torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rave_jax.families import family_for, family_named
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.models.config import ModelOptions
from tests.models.layout import Document, Visual, batch, document
from tests.parity.checkpoints import load

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).with_name("qwen_torch.py")
LIMIT = 2e-5


class Case(NamedTuple):
    """One checkpoint and one document."""

    name: str
    sizes: dict[str, Any]
    parts: list[int | Visual]
    changes: dict[str, Any] = {}  # noqa: RUF012  # read only
    attention: str = "sdpa"


VLM_CASES = [
    Case("text_only", {"num_heads": 6, "num_kv_heads": 2, "width": 48}, [23]),
    Case("one_image", {"num_heads": 6, "num_kv_heads": 2, "width": 48}, [5, Visual(1, 8, 8), 9]),
    Case(
        "untied_5_1", {"num_heads": 5, "num_kv_heads": 1, "width": 60, "tie_embeddings": False}, [Visual(1, 6, 10), 7]
    ),
    Case("tall_and_wide", {}, [3, Visual(1, 26, 2), 4, Visual(1, 2, 22), 5]),
    Case(
        "three_images",
        {"num_heads": 7, "num_kv_heads": 7, "width": 56},
        [2, Visual(1, 4, 6), 1, Visual(1, 10, 6), 3, Visual(1, 2, 2), 6],
    ),
    Case(
        "many_windows",
        {"vision_depth": 4, "full_attention_blocks": (1, 3)},
        [2, Visual(1, 14, 18), 4],
        attention="eager",
    ),
    Case("video", {}, [4, Visual(3, 6, 8, video=True, seconds=0.5), 6]),
    Case("image_and_video", {}, [4, Visual(1, 6, 4), 2, Visual(2, 4, 10, video=True, seconds=1.5), 6]),
    Case(
        "other_numbers",
        {"tie_embeddings": False},
        [4, Visual(1, 6, 12), 12],
        {"rms_norm_eps": 1e-3, "rope_theta": 1234.5, "use_sliding_window": False},
    ),
    Case(
        "sliding_window",
        {"num_layers": 4},
        [6, Visual(1, 6, 8), 20],
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        attention="eager",
    ),
]
TEXT_CASES = [
    Case(
        "qwen3",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
        [31],
    ),
    Case(
        "qwen3_tied",
        {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True},
        [17],
    ),
]


def hf_config(case: Case) -> dict[str, Any]:
    if case in TEXT_CASES:
        sizes = {"vocab_size": 96, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3}
        return {
            "model_type": "qwen3",
            **sizes,
            **case.sizes,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        }
    config = tiny(vocab_size=96, **case.sizes)
    return family_named("qwen2_5_vl").render(config) | case.changes


def torch_inputs(doc: Document, config: Any) -> dict[str, np.ndarray]:
    tokens = np.array([doc.tokens])
    if config.vision is None:
        return {"input_ids": tokens}
    vision = config.vision
    repeats = vision.patch_width // vision.in_channels
    mean, std = np.repeat(vision.pixel_mean, repeats), np.repeat(vision.pixel_std, repeats)
    types = (tokens == config.image_token_id) + 2 * (tokens == config.video_token_id)
    inputs = {"input_ids": tokens, "mm_token_type_ids": types.astype(np.int32)}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if doc.hf_pixels[kind]:
            pixels = np.concatenate(doc.hf_pixels[kind]).astype(np.float64)
            inputs[name] = ((pixels / 255 - mean) / std).astype(np.float32)
            inputs[f"{kind}_grid_thw"] = np.array(doc.hf_grids[kind])
    if doc.hf_seconds:
        inputs["second_per_grid_ts"] = np.array(doc.hf_seconds, np.float32)
    return inputs


def document_of(case: Case, seed: int) -> Document:
    config = family_for(hf_config(case)).parse(hf_config(case))
    return document(case.parts, config, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def folder(torch_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All checkpoints and torch's logits, made by one run of the script."""
    folder = tmp_path_factory.mktemp("parity")
    cases = []
    for seed, case in enumerate(VLM_CASES + TEXT_CASES):
        hf = hf_config(case)
        np.savez(folder / f"{case.name}.npz", **torch_inputs(document_of(case, seed), family_for(hf).parse(hf)))
        model = "text" if case in TEXT_CASES else "vlm"
        cases.append({"name": case.name, "model": model, "config": hf, "seed": seed, "attention": case.attention})
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run([torch_python, str(SCRIPT), str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("case", VLM_CASES + TEXT_CASES, ids=lambda case: case.name)
def test_logits_equal_those_of_torch(folder: Path, case: Case) -> None:
    check(folder, case, ModelOptions(attention="xla"))


@pytest.mark.parametrize("case", [VLM_CASES[5], TEXT_CASES[0]], ids=lambda case: case.name)
def test_dense_attention_equals_torch_too(folder: Path, case: Case) -> None:
    check(folder, case, ModelOptions(attention="reference"))


def check(folder: Path, case: Case, options: ModelOptions) -> None:
    seed = (VLM_CASES + TEXT_CASES).index(case)
    model = load(folder / case.name, options)
    doc = document_of(case, seed)
    # Padding on the right, as every batch has it, must change nothing.
    padded = batch(
        [[doc]], model.config, tokens=len(doc.tokens) + 3, patches=len(doc.patches) + (8 if doc.patches else 0)
    )

    @jax.jit
    def logits(model, padded):
        with jax.default_matmul_precision("highest"):
            return model.logits(model.hidden(padded))

    ours = np.asarray(logits(model, padded))[0, : len(doc.tokens)]
    theirs = np.load(folder / f"{case.name}.out.npz")["logits"][0]
    assert np.abs(theirs).max() > 0.5, "logits near zero would prove nothing"
    error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    assert error <= LIMIT, f"{case.name}: {error:.1e}"
