"""`rave-jax study` from its words to its exit code; what it runs is in `tests/study`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rave_jax.study.rows import Rows
from rave_jax.tools.cli import main
from tests.study.small import row_of, small

CONFIG = "from tests.study.small import small\n\n\ndef get_config():\n    return small({folder!r})\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "study_of_two.py"
    path.write_text(CONFIG.format(folder=str(tmp_path / "out")))
    return path


def test_a_report_is_of_the_rows_that_are_there(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small()
    rows = Rows(config.parent / "out", study)
    for cell in study.cells(("off", "biased")):
        rows.write(
            cell, row_of(study, cell, 0.6 + cell.seed / 10 + (0.05 + cell.seed / 1000) * (cell.arm.name != "off"))
        )
    assert main(["study", str(config), "--report"]) == 0
    told = capsys.readouterr().out
    assert "| `biased` | 0 | 3 | 75.1%" in told and "**better**" in told
    assert told.rstrip().endswith(str(rows.folder / "study.html")) and (rows.folder / "study.md").read_text() in told
    assert not (rows.folder / "work").exists(), "nothing was run"


def test_another_folder_may_be_given(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(config), "--report", "--out", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "study.html").is_file() and not (tmp_path / "out").exists()
    assert "not decided: no seed that both have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arm", "of"], "rave-jax: --arm is 'of', expected one of off, biased, slow, learned, learned-biased"),
        (["--seed", "5"], "rave-jax: --seed is 5, expected one of 0, 1, 2"),
        (["--out", "gs://bucket/x"], "expected a path of a file system"),
    ],
)
def test_bad_words_are_one_line(config: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(config), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_config_that_is_no_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "quickstart"]) == 2
    assert "expected a Study; `rave-jax train` takes a TrainConfig" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "rav.py")]) == 2
    said = capsys.readouterr().err
    assert "no such config file" in said and "did you mean studies/rave?" in said and "quickstart" not in said
    (tmp_path / "empty.py").write_text("from rave_jax.study.config import Study as get_config\n")
    assert main(["study", str(tmp_path / "empty.py")]) == 2
    assert "arms is (), expected at least one arm to run" in capsys.readouterr().err


def test_a_row_of_another_study_ends_it_before_anything_is_run(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = small()
    study = dataclasses.replace(study, starts=tuple(dataclasses.replace(s, score_every=1) for s in study.starts))
    cell = study.cells()[0]
    Rows(config.parent / "out", study).write(cell, row_of(study, cell, 0.5))
    assert main(["study", str(config)]) == 2
    assert "off-0.json is a row of another study (score_every is 2, was 1)" in capsys.readouterr().err


def test_studies_of_the_package_have_names() -> None:
    from rave_jax.command_line import config_file, config_names

    assert {"studies/gaze", "studies/mechanisms", "studies/rave"} <= set(config_names("studies"))
    assert config_file("studies/rave").name == config_file("configs/studies/rave.py").name == "rave.py"
    assert "studies/rave" not in config_names() and "studies/study_recipe" not in config_names("studies")
