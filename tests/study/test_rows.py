"""Kept rows: written whole, read back, refused where they are of another study; and claims of jobs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rave_jax.attention import VisualBias
from rave_jax.config import ConfigError
from rave_jax.models.config import ModelOptions
from rave_jax.study.rows import Rows, claim
from tests.study.small import RECIPE, row_of, small


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    study = small()
    rows, cell = Rows(tmp_path, study), study.cells()[0]
    assert rows.read(cell) is None
    row = row_of(study, cell, 0.75, findings={"mosaic/entries": 9.0})
    rows.write(cell, row)
    assert rows.read(cell) == row and row.score == 0.75
    assert rows.all() == {"off": {0: row}, **{arm.name: {} for arm in study.arms[1:]}}
    assert [path.name for path in rows.file(cell).parent.iterdir()] == ["off-0.json"], "no part of it is left"


def test_a_row_of_another_recipe_is_refused_by_what_differs(tmp_path: Path) -> None:
    study = small()
    cell = study.cells(("biased",))[0]
    Rows(tmp_path, study).write(cell, row_of(study, cell, 0.5))
    other = dataclasses.replace(
        study, arms=(*study.arms[:1], dataclasses.replace(study.arms[1], model=ModelOptions((VisualBias(1.0),))))
    )
    with pytest.raises(ConfigError, match=r"-0.json is a row of another study \(run.model.mechanisms.0.bias is 1.0, "):
        Rows(tmp_path, other).read(other.cells(("biased",))[0])
    tasks = (dataclasses.replace(study.tasks[0], samples=3),)
    with pytest.raises(ConfigError, match=r"tasks.0.samples is 3, was 4"):
        Rows(tmp_path, dataclasses.replace(study, tasks=tasks)).read(cell)
    longer = dataclasses.replace(study.starts[0], recipe=dataclasses.replace(RECIPE, steps=4))
    with pytest.raises(ConfigError, match=r"run.steps is 4, was 3"):
        Rows(tmp_path, dataclasses.replace(study, starts=(longer, study.starts[1]))).read(cell)


def test_phases_are_a_part_of_the_recipe_and_devices_are_not(tmp_path: Path) -> None:
    study = small()
    cell = study.cells(("learned",))[0]
    row = row_of(study, cell, 0.5)
    Rows(tmp_path, study).write(cell, row)
    two = dataclasses.replace(study.starts[1], phases=(RECIPE, RECIPE))
    with pytest.raises(ConfigError, match="the start has 2 phases, had 1"):
        Rows(tmp_path, dataclasses.replace(study, starts=(study.starts[0], two))).read(cell)
    tasks = (dataclasses.replace(study.tasks[0], rows=2),)
    elsewhere = dataclasses.replace(study, simulated_devices=4, output_dir="other", tasks=tasks, seeds=(0, 9))
    assert Rows(tmp_path, elsewhere).read(cell) == row


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "arm": "off"}', "\xff"])
def test_a_file_that_is_no_row_is_named(tmp_path: Path, text: str) -> None:
    study = small()
    rows, cell = Rows(tmp_path, study), study.cells()[0]
    rows.file(cell).parent.mkdir(parents=True)
    rows.file(cell).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"off-0.json.* row"):
        rows.read(cell)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("scores", {"mosaic": "high"}, "format"),
        ("scores", {"mosaic": float("nan")}, "format"),
        ("scores", {"mosaic": 7}, "of this run"),
        ("scores", {"other": 0.5}, "of this run"),
        ("seed", 1, "of this run"),
        ("parameters", {"all": 3}, "format"),
        ("curves", {"loss": [[1]]}, "format"),
        ("findings", [1], "format"),
        ("made_with", 3, "format"),
    ],
)
def test_a_row_that_was_damaged_is_named(tmp_path: Path, field: str, value: Any, said: str) -> None:
    study = small()
    rows, cell = Rows(tmp_path, study), study.cells()[0]
    rows.write(cell, row_of(study, cell, 0.5))
    data = json.loads(rows.file(cell).read_text())
    rows.file(cell).write_text(json.dumps(data | {field: value}))
    with pytest.raises(ConfigError, match=f"off-0.json is 'no row.* {said}', expected .*remove the file"):
        rows.read(cell)


def test_a_row_that_lacks_its_phases_is_named(tmp_path: Path) -> None:
    study = small()
    rows, cell = Rows(tmp_path, study), study.cells()[0]
    rows.write(cell, row_of(study, cell, 0.5))
    data = json.loads(rows.file(cell).read_text())
    data["made_with"] = {"run": {"type": "TrainConfig", "step": 3}}
    rows.file(cell).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"made_with.step: TrainConfig has no such field; did you mean 'steps'"):
        rows.read(cell)


def test_what_other_phases_gave_is_not_gone_on_from(tmp_path: Path) -> None:
    study = small()
    Rows(tmp_path, study).begin_start(study.starts[1], 0)
    Rows(tmp_path, study).begin_start(study.starts[1], 0)
    other = dataclasses.replace(study.starts[1], phases=(dataclasses.replace(RECIPE, steps=9),))
    with pytest.raises(ConfigError, match=r"learned-0 holds what other phases gave \(phases.0.steps is 9, was 3\)"):
        Rows(tmp_path, study).begin_start(other, 0)
    (tmp_path / "starts" / "learned-0" / "phases.json").write_text("{")
    with pytest.raises(ConfigError, match=r"phases.json: cannot be read"):
        Rows(tmp_path, study).begin_start(study.starts[1], 0)


def test_one_job_at_a_time_has_a_folder(tmp_path: Path) -> None:
    with claim(tmp_path / "work" / "off-0") as first, claim(tmp_path / "work" / "off-0") as second:
        assert first and not second
    with claim(tmp_path / "work" / "off-0") as again:
        assert again
