"""Logits and greedy answers of the text families on random checkpoints made by transformers, against torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.families import FAMILIES
from rave_jax.inference import Engine, Sampling, SlotConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.parameters import locate, named_parameters
from rave_jax.models.vlm import Vlm
from tests.models.layout import batch, document
from tests.parity.test_generation import example

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).with_name("text_torch.py")
LIMIT = 2e-5
LENGTH, NEW, PENALTY = 29, 16, 1.3
SIZES = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3}

EXPERTS = {
    "model_type": "qwen3_moe",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 20,
    "router_aux_loss_coef": 0.3,
}


class Case(NamedTuple):
    """One checkpoint, by what its config adds to `SIZES`."""

    name: str
    config: dict[str, Any]


CASES = [
    Case(
        "llama_untied_6_2",
        {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    ),
    Case(
        "llama_3_1_rope_tied",
        {
            "model_type": "llama",
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    Case(
        "llama_linear_rope",
        {
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    Case(
        "qwen2_tied_6_2",
        {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    Case(
        "qwen2_window",
        {
            "model_type": "qwen2",
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    Case(
        "qwen3_moe_some_layers",
        EXPERTS | {"mlp_only_layers": [1], "norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 3},
    ),
    Case(
        "qwen3_moe_every_second_layer",
        EXPERTS | {"decoder_sparse_step": 2, "norm_topk_prob": False, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    Case(
        "qwen3_moe_window",
        EXPERTS | {"num_experts": 2, "num_experts_per_tok": 1, "use_sliding_window": True, "sliding_window": 6},
    ),
]
WITH_EXPERTS = [case for case in CASES if case.config["model_type"] == "qwen3_moe"]


def tokens_of(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], LENGTH).tolist()


@pytest.fixture(scope="module")
def folder(torch_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All checkpoints and what torch computes with them, made by one run of the script."""
    folder = tmp_path_factory.mktemp("text")
    cases = [
        {
            "name": name,
            "config": SIZES | config,
            "seed": seed,
            "tokens": tokens_of(seed),
            "new_tokens": NEW,
            "penalty": PENALTY,
            "router": config["model_type"] == "qwen3_moe",
        }
        for seed, (name, config) in enumerate(CASES)
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run([torch_python, str(SCRIPT), str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_and_greedy_answers_equal_those_of_torch(folder: Path, case: Case) -> None:
    theirs = np.load(folder / f"{case.name}.out.npz")
    model = import_hf(folder / case.name, ModelOptions())
    tokens = tokens_of(CASES.index(case))
    doc = document([LENGTH], model.config, np.random.default_rng(0))
    doc.tokens = tokens
    # Padding on the right, as every batch has it, must change nothing.
    padded = batch([[doc]], model.config, tokens=LENGTH + 3, patches=0)

    @jax.jit
    def logits(model, padded):
        with jax.default_matmul_precision("highest"):
            return model.logits(model.forward(padded).hidden)

    ours, wanted = np.asarray(logits(model, padded))[0, :LENGTH], theirs["logits"]
    assert np.abs(wanted).max() > 0.5, "logits near zero would prove nothing"
    error = np.abs(ours - wanted).max() / max(1.0, np.abs(wanted).max())
    assert error <= LIMIT, f"{case.name}: {error:.1e}"

    assert len(set(theirs["answer"].tolist())) > 5, "an answer that repeats itself proves nothing"
    with jax.default_matmul_precision("highest"):
        assert greedy(model, tokens) == theirs["answer"].tolist()


def greedy(model: Vlm, tokens: list[int]) -> list[int]:
    """The answer of our generator; nothing ends it before its length."""
    engine = Engine(model, SlotConfig(slots=1, max_length=64, chunk=64, smallest=64), ())
    engine.submit(example(tokens), Sampling(NEW, repetition_penalty=PENALTY))
    made: list[int] = []
    while engine.waiting or engine.running:
        for progress in engine.step():
            assert progress.error is None, progress.error
            made.extend(progress.tokens)
    return made


@pytest.mark.parametrize("case", WITH_EXPERTS, ids=lambda case: case.name)
def test_the_loss_of_routers_and_its_gradients_equal_those_of_torch(folder: Path, case: Case) -> None:
    """Of two rows, the second half of the other one padding."""
    theirs = np.load(folder / f"{case.name}.out.npz")
    model = import_hf(folder / case.name, ModelOptions())
    docs = [document([length], model.config, np.random.default_rng(0)) for length in (LENGTH, LENGTH // 2)]
    for doc in docs:
        doc.tokens = tokens_of(CASES.index(case))[: len(doc.tokens)]
    rows = batch([[doc] for doc in docs], model.config, tokens=LENGTH, patches=0)

    @jax.jit
    @jax.value_and_grad
    def loss(model: Vlm) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return model.forward(rows, Want(losses=True)).losses["router"] / model.loss_weights(rows.info)["router"]

    value, gradient = loss(model)
    np.testing.assert_allclose(value, theirs["loss"], rtol=1e-5)
    ours = {path: np.asarray(x[...]) for path, x in named_parameters(gradient).items()}
    compared = 0
    for rule in FAMILIES[model.config.family].formats[1](model.config):
        key = f"grad {rule.hf_key}"
        path, layer = locate(model, rule)
        found = ours[path] if layer is None else ours[path][layer]
        if key not in theirs:  # what stands behind the last router
            assert not found.any()
            continue
        cut = rule.cut
        wanted = theirs[key] if cut is None else np.split(theirs[key], cut.count, cut.axis)[cut.number]
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=2e-5 * max(np.abs(wanted).max(), 1e-3))
        compared += wanted.any()
    assert compared > 10
