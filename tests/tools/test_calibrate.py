"""`rave-jax calibrate zero-tuning`: what it writes goes into a config, and makes a model better by its criterion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rave_jax import config as machinery
from rave_jax.attention import MechanismConfig, ZeroTuning
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.sidecar import options_text
from rave_jax.checkpoint.tiny import write_tiny
from rave_jax.data.synthetic import Synthetic
from rave_jax.evaluation.calibration import CalibrationSet, encoded
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.tools import source as sources
from rave_jax.tools.cli import main
from tests.tools.test_cli import SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("calibrate") / "model", SMALL)


@pytest.mark.slow
def test_what_is_found_by_entropy_makes_a_built_model_surer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "found.json"
    grid = [word for gamma in ("0.2", "1", "5") for word in ("--grid", gamma)]
    given = ["--criterion", "entropy", "--samples", "5", "--rows", "8", "--fraction", "0.6", *grid]
    assert main(["calibrate", "zero-tuning", str(folder), str(out), *given]) == 0
    said = capsys.readouterr().out
    assert "5 samples, entropy" in said and said.count("kept") == 1 and str(out) in said.replace("\n", "")
    found = machinery.loads(tuple[MechanismConfig, ...], out.read_text())
    assert found and all(isinstance(one, ZeroTuning) for one in found)
    assert list(out.parent.iterdir()) == [out]

    processor = sources.processor_of(folder)
    source = Synthetic(split="heldout").build()
    examples = [encoded(processor, source[n], "entropy") for n in range(5)]
    means = []
    for mechanisms in ((), found):
        mesh = make_mesh(MeshConfig())
        model = import_hf(folder, ModelOptions(mechanisms=mechanisms), mesh)
        measure = CalibrationSet(model, processor, examples, "entropy", mesh, 8)
        means.append(measure(np.ones((SMALL.num_layers, SMALL.num_heads))).mean())
    assert means[1] < means[0]
    assert f"entropy {means[0]:.4f} as the model is" in said and f"{means[1]:.4f}" in said


def test_a_file_of_questions_where_nothing_helps_changes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"question": f"What is {n} and {n}?", "answers": [str(2 * n)]} for n in range(3)]
    lines.append({"question": "And without an answer?"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "found.json"
    given = ["--data", str(tmp_path / "data.jsonl"), "--grid", "1.0", "--rows", "8"]
    assert main(["calibrate", "zero-tuning", str(folder), str(out), *given]) == 0
    assert json.loads(out.read_text()) == []
    captured = capsys.readouterr()
    assert "3 samples, accuracy 0.0000" in captured.out and "left out: 1 empty answer" in captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "2"], "grid"),
        (["--grid", "much"], "grid"),
        (["--grid", "1e-40", "--grid", "1"], "expected numbers from 1e-30 to 1e+30, 1 (no change) among them"),
        (["--samples", "0"], "samples"),
        (["--data", "{tmp}/nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "{tmp}/unanswered.jsonl"], "no sample of"),
        (["--criterion", "luck"], "luck"),
    ],
)
def test_misuse_is_one_line(
    words: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unanswered.jsonl").write_text('{"question": "What?"}\n')
    given = [str(folder), str(tmp_path / "out.json"), *(word.format(tmp=tmp_path) for word in words)]
    try:
        code = main(["calibrate", "zero-tuning", *given])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "out.json").exists()


def test_a_model_that_is_tuned_and_a_folder_as_the_file_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "zero-tuning", str(folder), str(tmp_path)]) == 2
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for file in folder.iterdir():
        (tuned / file.name).symlink_to(file)
    (tuned / "rave_jax.json").unlink(missing_ok=True)
    (tuned / "rave_jax.json").write_text(options_text(ModelOptions(mechanisms=(ZeroTuning(2.0),))))
    assert main(["calibrate", "zero-tuning", str(tuned), str(tmp_path / "out.json")]) == 2
    err = capsys.readouterr().err
    assert "it exists and is not a file" in err and "has ZeroTuning already" in err
