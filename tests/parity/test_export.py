"""What we write is a model to transformers: every key, every number, and the same logits from the same request."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from rave_jax.attention import Rave
from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.peft_export import export_peft
from rave_jax.checkpoint.tiny import Tiny, write_tiny
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.tools.cli import main

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).with_name("export_torch.py")
LORA = Lora(
    rank=3,
    alpha=4.0,
    targets=(
        *(f"decoder.attention.{name}" for name in ("query", "key", "value", "output")),
        *(f"{stack}.mlp.{name}" for stack in ("decoder", "vision") for name in ("gate", "up", "down")),
        *(f"vision.attention.{name}" for name in ("qkv", "output")),
    ),
)
SMALL = Tiny(hidden_size=48, num_layers=3, num_heads=6, num_kv_heads=2, mlp_size=80, vision_layers=3)


def picture(path: Path, height: int, width: int) -> dict[str, str]:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return {"type": "image", "image": path.name}


def shaken(model: Vlm) -> Vlm:
    """Biases and norms away from their start, or errors in them would not show."""
    vectors = {p: v[...] for p, v in named_parameters(model).items() if p.endswith(("bias", "norm.weight"))}
    keys = jax.random.split(jax.random.key(7), len(vectors))
    noise = {
        path: value + 0.2 * jax.random.normal(key, value.shape, value.dtype)
        for key, (path, value) in zip(keys, vectors.items(), strict=True)
    }
    return with_values(model, noise)


def with_adapters(model: Vlm) -> Vlm:
    """Adapters as training leaves them: large enough to change every logit."""
    adapters = {p: v[...] for p, v in named_parameters(model).items() if ".adapter." in p}
    keys = jax.random.split(jax.random.key(11), len(adapters))
    return with_values(
        model, {p: 0.2 * jax.random.normal(k, v.shape) for k, (p, v) in zip(keys, adapters.items(), strict=True)}
    )


@pytest.fixture(scope="module")
def results(torch_python: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directories, and what transformers says of them in one run."""
    folder = tmp_path_factory.mktemp("export")
    write_tiny(folder / "start", SMALL)
    start = import_hf(folder / "start", ModelOptions(mechanisms=(Rave(rank=2),)))
    asked = export_hf(shaken(start), folder / "asked", folder / "start", max_shard_bytes=200_000)
    adapted = with_adapters(import_hf(folder / "start", ModelOptions(lora=LORA)))
    merged = export_hf(adapted, folder / "merged", folder / "start")
    adapter = export_peft(adapted, folder / "adapter", folder / "start")
    export_hf(adapted, folder / "beside", folder / "start", lora="beside")
    text = {"type": "text", "text": "Wie viele Äpfel?"}
    first, second = picture(asked / "first.png", 61, 290), picture(asked / "second.png", 300, 97)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [first, text, second]},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And now?"},
    ]
    (asked / "request.json").write_text(json.dumps(messages))
    for other in (merged, adapter, folder / "beside"):
        for file in ("request.json", "first.png", "second.png"):
            (other / file).write_bytes((asked / file).read_bytes())
    untied = tiny(vocab_size=64, tie_embeddings=False)
    export_hf(shaken(Vlm(untied, ModelOptions(param_dtype="bfloat16"), key=jax.random.key(0))), folder / "bfloat16")
    names = ["start", "asked", "bfloat16", "merged", "adapter", "beside"]
    out = folder / "results.json"
    subprocess.run([torch_python, str(SCRIPT), str(out), *(str(folder / n) for n in names)], check=True, timeout=300)
    return folder, json.loads(out.read_text())


@pytest.mark.parametrize("name", ["start", "asked", "bfloat16", "merged", "adapter"])
def test_transformers_loads_every_number(results: tuple[Path, dict[str, Any]], name: str) -> None:
    found = results[1][name]
    assert found["missing_keys"] == found["unexpected_keys"] == found["mismatched_keys"] == []
    assert found["same"] and found["count"] > (20 if name == "adapter" else 30)


def test_the_logits_command_says_what_transformers_says(results: tuple[Path, dict[str, Any]]) -> None:
    folder = results[0]
    asked = folder / "asked"
    assert main(["logits", str(asked), str(asked / "request.json"), str(folder / "ours.npz")]) == 0
    ours, theirs = np.load(folder / "ours.npz"), np.load(folder / "asked.npz")
    assert np.array_equal(ours["input_ids"], theirs["input_ids"])
    assert np.abs(theirs["logits"]).max() > 0.5, "logits near zero would prove nothing"
    error = np.abs(ours["logits"] - theirs["logits"]).max() / max(1.0, np.abs(theirs["logits"]).max())
    assert error <= 2e-5, f"{error:.1e}"


def test_lora_as_transformers_and_peft_compute_it(results: tuple[Path, dict[str, Any]]) -> None:
    folder = results[0]
    beside = folder / "beside"
    assert main(["logits", str(beside), str(beside / "request.json"), str(folder / "lora.npz")]) == 0
    ours = np.load(folder / "lora.npz")["logits"]
    for name in ("merged", "adapter"):
        theirs = np.load(folder / f"{name}.npz")["logits"]
        error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
        assert error <= 2e-4, f"{name}: {error:.1e}"
    # What lies beside weights that it does not change is not there for transformers: the files say so.
    unadapted = np.load(folder / "beside.npz")["logits"]
    assert np.abs(ours - unadapted).max() > 0.1
    assert "LoRA of rank 3" in (beside / "README.md").read_text()
