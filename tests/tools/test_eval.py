"""`eval.py` on an HF directory, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rave_jax.checkpoint.tiny import Tiny, write_tiny
from rave_jax.command_line import override
from rave_jax.evaluation.config import Examination
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.tools.eval import load, main

SMALL = ("--evals.0.samples", "6", "--evals.0.rows", "4", "--evals.0.max_new_tokens", "2", "--evals.0.patches", "36")
FEW = ("--evals.0.looks", "3", "--evals.0.pictures", "2", "--evals.0.vas", "5")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = Tiny(
        hidden_size=32,
        num_layers=2,
        mlp_size=32,
        vision_hidden_size=32,
        vision_layers=2,
        vision_heads=2,
        vision_mlp_size=32,
    )
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", sizes)


@pytest.mark.slow
def test_a_users_own_questions_are_asked_of_an_hf_directory(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six questions about three pictures, from flags alone; the score comes with its interval and its floor."""
    for number in range(3):
        Image.new("RGB", (84, 84), (80 * number, 40, 20)).save(tmp_path / f"{number}.png")
    questions = [
        {"image": f"{n // 2}.png", "question": "Which?", "answers": ["yes"], "evidence": [0, 0, 42, 84]}
        for n in range(6)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    own = ("--evals.0.data", "qa-jsonl", "--evals.0.data.path", str(tmp_path / "own.jsonl"))
    assert main([str(model_dir), *SMALL, *FEW, *own, "--output_dir", str(tmp_path), "--evals.0.name", "mine"]) == 0
    said = capsys.readouterr().out
    assert "Evaluation: mine" in said and "question-only floor" in said and "interval over 3 pictures" in said
    folder = tmp_path / "evaluation" / "mine"
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 6
    assert len(list((folder / "pictures").glob("*.png"))) == len(list((folder / "pictures").glob("*.npz"))) == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["total"]["pictures"] == 3 and summary["floor"]["floor"] == 1.0, "yes is the only answer"
    looking, vas = summary["looking"], summary["vas"]
    assert looking["samples"] == 3 and 0 < looking["boxes"]["in_box"] < 1
    assert vas == {"samples": 5, "ratios": 0, "score": None}, "its chat template writes no system prompt"
    page = (tmp_path / "report.md").read_text()
    assert "pictures/" in page and "VAS: none of 5 samples has a question after both" in page


def test_special_tokens_in_texts_may_be_meant(model_dir: Path) -> None:
    talk = [{"role": "user", "content": "<|im_end|>"}]
    for words, count in (([], 1), (["--special_tokens_in_text", "tokens"], 2)):
        _, processor = load(model_dir, override(Examination(), words), make_mesh(MeshConfig()))
        assert processor.encode(talk).tokens.tolist().count(processor.end_id) == count


def test_what_cannot_be_done_ends_with_one_line(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--output_dir", str(tmp_path / "out"))
    (tmp_path / "file").write_text("")
    for argv, code, said in (
        ([str(tmp_path / "nowhere"), *out], 2, "nowhere: no such directory"),
        ([str(tmp_path), *out], 2, "holds no config.json; expected a model directory in HuggingFace format, or a"),
        ([str(model_dir), *out, "--step", "3"], 2, "step is 3, but"),
        ([str(model_dir), *SMALL, *out, "--evals.0.layers", "7"], 2, "layers has 7"),
        ([str(model_dir), *SMALL, "--output_dir", str(tmp_path / "file")], 1, "file"),
        ([], 2, "usage"),
    ):
        assert main(argv) == code
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_misspelt_field_is_refused_with_a_suggestion(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(model_dir), "--evals.0.sampels", "3"])
    assert exit_.value.code == 2
    assert "--evals.0.samples" in capsys.readouterr().err
