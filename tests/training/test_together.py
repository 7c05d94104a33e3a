"""One run with bfloat16 parameters, master copies, 8-bit moments, an average, adapters and a z-loss, to its export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rave_jax.evaluation.config import Eval
from rave_jax.models.config import Lora
from rave_jax.models.parameters import named_parameters
from rave_jax.observe.metrics import OF_TIME, read_jsonl
from rave_jax.tools import cli, train
from rave_jax.tools import eval as evaluation
from rave_jax.training.algorithms import AdamW
from rave_jax.training.averages import Ema
from rave_jax.training.config import TrainConfig
from rave_jax.training.optimizers import ParameterGroup
from rave_jax.training.run import load_run
from tests.resume import small_run

# Two runs, two exports, four programs of logits and an evaluation.
pytestmark = pytest.mark.slow

ADAPTED = r"decoder\.(attention\.query|mlp\..*)"


def get_config() -> TrainConfig:
    """The small run with all of it; its adapters, gate, embedding and norms are trained."""
    config = small_run.get_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, param_dtype="bfloat16", compute_dtype="bfloat16", lora=Lora(2, 4.0, (ADAPTED,))
        ),
        optimizer=dataclasses.replace(
            config.optimizer,
            learning_rate=1e-2,
            algorithm=AdamW(first_moment="8-bit", second_moment="8-bit"),
            master_copies=True,
            ema=Ema(decay=0.5, evaluate=True),
            groups=(
                ParameterGroup("tower", r"^vision\.", frozen=True),
                ParameterGroup("base", r"layers\.(attention|mlp)\.\w+\.(weight|bias)$", frozen=True),
            ),
        ),
        z_loss=1e-4,
        steps=4,
        final=(Eval(samples=8, rows=8, looks=0, pictures=0, max_new_tokens=2),),
        tensorboard=False,
    )


def curve(run: Path) -> list[dict]:
    return [{name: x for name, x in row.items() if name not in OF_TIME} for row in read_jsonl(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "run"
    assert train.main([__file__, "--output_dir", str(folder)]) == 0
    return folder


def test_what_is_lost_behind_a_checkpoint_is_done_again_bit_for_bit(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.rmtree(again / "evaluation")
    assert train.main([__file__, "--output_dir", str(again)]) == 0
    assert curve(again) == curve(run)
    assert curve(run)[-1]["loss/z"] > 0
    one, two = (load_run(x, as_stored=True, weights="ema").model for x in (run, again))
    for a, b in zip(named_parameters(one).items(), named_parameters(two).items(), strict=True):
        np.testing.assert_array_equal(a[1][...], b[1][...], err_msg=a[0])


def test_the_average_is_what_evaluations_take(run: Path, tmp_path: Path) -> None:
    few = ("--evals.0.samples", "8", "--evals.0.rows", "8", "--evals.0.looks", "0", "--evals.0.pictures", "0")
    out = ("--evals.0.max_new_tokens", "2", "--output_dir", str(tmp_path / "out"))
    assert evaluation.main([str(run), "--weights", "ema", *few, *out]) == 0
    found, during = (
        [json.loads(line) for line in (x / "evaluation" / "heldout" / "predictions.jsonl").read_text().splitlines()]
        for x in (tmp_path / "out", run)
    )
    assert found == during


def test_an_export_has_the_precision_of_the_master_copies_and_the_logits_of_the_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "ask.json").write_text(json.dumps([{"role": "user", "content": "Which digit?"}]))
    logits = {}
    for weights in ("trained", "ema"):
        out = tmp_path / weights
        assert cli.main(["convert", "to-hf", str(run), str(out), "--weights", weights]) == 0
        stored = load_run(run, as_stored=True, weights=weights).model
        values = {name: np.asarray(param[...]) for name, param in named_parameters(stored).items()}
        tensors = {name: x for file in out.glob("*.safetensors") for name, x in load_file(file).items()}
        embedding = values["embed.weight"]
        assert embedding.dtype == np.float32
        (written,) = (x for name, x in tensors.items() if name.endswith("embed_tokens.weight"))
        np.testing.assert_array_equal(written, embedding)
        assert not any("adapter" in name or "lora" in name for name in tensors), "adapters are merged"
        assert cli.main(["logits", str(out), str(tmp_path / "ask.json"), str(tmp_path / f"{weights}.npz")]) == 0
        logits[weights] = np.load(tmp_path / f"{weights}.npz")["logits"]
    assert np.abs(logits["trained"] - logits["ema"]).max() > 1e-3
    assert cli.main(["logits", str(run), str(tmp_path / "ask.json"), str(tmp_path / "run.npz")]) == 0
    np.testing.assert_allclose(logits["trained"], np.load(tmp_path / "run.npz")["logits"], atol=1e-4)
