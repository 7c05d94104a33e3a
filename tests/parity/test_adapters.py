"""LoRA on experts, routers, the head and the embedding is PEFT's: what each writes, the other computes alike."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.peft_export import export_peft
from rave_jax.checkpoint.peft_import import import_peft
from rave_jax.families.config import ExpertsConfig, TextConfig, VlmConfig
from rave_jax.families.qwen3_vl.presets import tiny
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from tests.models.layout import batch, document
from tests.models.made import model as made

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).with_name("adapters_torch.py")
LORA = Lora(rank=2, alpha=3.0, targets=(r"decoder\.(mlp\..*|attention\.query)", "lm_head", "embed"))
TEXT = TextConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=20,
    qkv_bias=False,
    qk_norm=True,
    tie_embeddings=False,
    experts=ExpertsConfig(count=4, chosen=2, mlp_size=8),
)
SEEING = tiny(vocab_size=32, num_layers=2, vision_depth=1, deep_blocks=())
CASES = {
    "text": VlmConfig(text=TEXT, eos_token_ids=(3,), family="qwen3_moe"),
    "tied": dataclasses.replace(
        SEEING, text=dataclasses.replace(SEEING.text, experts=TEXT.experts), family="qwen3_vl_moe"
    ),
}


@jax.jit
def logits(model: Vlm) -> jax.Array:
    return model.logits(model.forward(rows(model.config)).hidden)[0]


def adapted(config: VlmConfig) -> Vlm:
    """The base with adapters that are large enough to change every logit."""
    weights = {path: x[...] for path, x in named_parameters(made(config)).items()}
    return with_values(made(config, ModelOptions(lora=LORA)), weights)


def rows(config: VlmConfig):
    return batch([[document([12], config, np.random.default_rng(0))]], config, tokens=12, patches=0)


@pytest.fixture(scope="module")
def folder(torch_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name, config in CASES.items():
        base = export_hf(made(config), root / name / "base")
        export_hf(adapted(config), root / name / "merged", base)
        export_peft(adapted(config), root / name / "ours", base)
    cases = [{"name": name, "tokens": rows(config).tokens[0].tolist()} for name, config in CASES.items()]
    (root / "cases.json").write_text(json.dumps(cases))
    subprocess.run([torch_python, str(SCRIPT), str(root)], check=True, timeout=300)
    return root


@pytest.mark.parametrize("name", list(CASES))
def test_adapters_are_computed_as_peft_computes_them(folder: Path, name: str) -> None:
    theirs, base = np.load(folder / name / "out.npz"), folder / name / "base"
    here = logits(adapted(CASES[name]))
    ours = {
        "base": logits(import_hf(base)),
        "ours": here,
        "merged": here,
        "theirs": logits(import_peft(folder / name / "theirs", base)),
    }
    for model, found in ours.items():
        error = np.abs(found - theirs[model]).max() / np.abs(theirs[model]).max()
        assert error <= 2e-5, f"{model}: {error:.1e}"
    assert all(np.abs(theirs[model] - theirs["base"]).max() > 0.1 for model in ("ours", "theirs"))
