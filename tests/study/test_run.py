"""The work of a study: every row once, whoever shares it and whatever ends it; and one small study for real."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rave_jax.attention import Gaze
from rave_jax.checkpoint.saved_step import steps_in
from rave_jax.checkpoint.tiny import Tiny
from rave_jax.config import dumps
from rave_jax.layout import FixedRegions
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.stopping import Interrupted, StopRequest
from rave_jax.study import run as run_module
from rave_jax.study.config import Arm, Cell, Start, Study
from rave_jax.study.page import write
from rave_jax.study.rows import Row, Rows, claim
from rave_jax.study.run import Outcome, make_row, run_missing, start_from
from rave_jax.study.summary import summarise
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF
from rave_jax.training.loop import NonFiniteError
from tests.study.small import RECIPE, row_of, small


def silent(line: str) -> None:
    """Nothing is said."""


class StandIn:
    """Makes rows without training, and remembers which."""

    def __init__(self, before: Callable[[Cell], Any] = lambda cell: None):
        self.made: list[str] = []
        self._before = before

    def __call__(self, study: Study, cell: Cell, rows: Rows) -> Row:
        assert rows.work(cell).is_dir(), "the folder is held before anything is run"
        self._before(cell)
        self.made.append(cell.name)
        return row_of(study, cell, 0.5)


def run(study: Study, folder: Path, make: Any, cells: Any = None) -> Outcome:
    return run_missing(study, Rows(folder, study), cells or study.cells(), make, silent)


def test_what_is_missing_is_run_once(tmp_path: Path) -> None:
    study, make = small(), StandIn()
    assert run(study, tmp_path, make, study.cells(("slow",))) == Outcome([], [])
    assert make.made == ["slow-0", "slow-1", "slow-2"]
    run(study, tmp_path, make)
    assert sorted(make.made) == sorted(cell.name for cell in study.cells()) and len(make.made) == len(set(make.made))
    assert not any((tmp_path / "work").iterdir()), "finished runs leave their rows alone"


@pytest.mark.parametrize("error", [Interrupted("asked", 143), KeyboardInterrupt()])
def test_a_study_that_is_ended_goes_on_behind_its_last_row(tmp_path: Path, error: BaseException) -> None:
    def end(cell: Cell) -> None:
        if cell.name == "slow-1":
            raise error

    study, first, second = small(), StandIn(end), StandIn()
    with pytest.raises(type(error)):
        run(study, tmp_path, first)
    assert first.made[-1] == "biased-1" and Rows(tmp_path, study).work(study.cells(("slow",), (1,))[0]).is_dir()
    run(study, tmp_path, second)
    assert second.made[0] == "slow-1" and [*first.made, *second.made] == [cell.name for cell in study.cells()]


def test_jobs_share_the_work_and_leave_to_others_what_they_hold(tmp_path: Path) -> None:
    """While one job runs a cell, another runs all that is left, and neither runs what the other has."""
    study, other = small(), StandIn()
    seen: list[Outcome] = []

    def meanwhile(cell: Cell) -> None:
        if cell.name == "biased-0":
            seen.append(run(study, tmp_path, other))

    make = StandIn(meanwhile)
    assert run(study, tmp_path, make) == Outcome([], [])
    assert seen == [Outcome([], ["biased-0"])] and make.made == ["off-0", "biased-0"]
    assert sorted([*make.made, *other.made]) == sorted(cell.name for cell in study.cells())


def test_a_run_that_another_job_has_finished_meanwhile_is_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    study, make = small(), StandIn()
    rows, (cell,) = Rows(tmp_path, study), study.cells(("off",), (0,))
    found = iter([None, row_of(study, cell, 0.25)])
    monkeypatch.setattr(rows, "read", lambda cell: next(found))
    assert run_missing(study, rows, [cell], make, silent) == Outcome([], []) and make.made == []


def test_a_run_that_is_not_finite_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    def diverge(cell: Cell) -> None:
        if cell.arm.name == "slow":
            raise NonFiniteError("loss is nan at step 2")

    study, make = small(), StandIn(diverge)
    outcome = run(study, tmp_path, make)
    assert outcome.failed == [f"slow-{seed}: loss is nan at step 2" for seed in (0, 1, 2)]
    assert len(make.made) == 12 and Rows(tmp_path, study).read(study.cells(("slow",))[0]) is None


def test_directories_stay_where_they_are_asked_for(tmp_path: Path) -> None:
    study = small(keep_runs=True)
    run(study, tmp_path, StandIn(), study.cells(("off",), (0,)))
    assert (tmp_path / "work" / "off-0").is_dir()
    with claim(tmp_path / "work" / "off-0") as free:
        assert free


class Phases:
    """In place of training and export: remembers the runs, and may end before one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, end_at: int | None = None):
        self.runs: list[TrainConfig] = []
        self._end_at = end_at
        patch.setattr(run_module, "train", self._train)
        patch.setattr(run_module, "load_run", lambda folder, mesh: SimpleNamespace(model=folder))
        patch.setattr(run_module, "export_hf", lambda model, folder, source: folder.mkdir())
        patch.setattr(run_module, "make_mesh", lambda config: None)

    def _train(self, config: TrainConfig, stop: StopRequest | None) -> None:
        if len(self.runs) == self._end_at:
            raise Interrupted("asked", 143)
        Path(config.output_dir).mkdir(parents=True)
        self.runs.append(config)


def test_phases_are_made_once_one_from_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(starts=(Start("two", (RECIPE, dataclasses.replace(RECIPE, steps=9))),), arms=())
    rows, (start,) = Rows(tmp_path, study), study.starts
    with monkeypatch.context() as patch:
        first = Phases(patch, end_at=1)
        with pytest.raises(Interrupted):
            start_from(study, start, 4, rows)
    assert [run.steps for run in first.runs] == [3] and isinstance(first.runs[0].init, Tiny)
    second = Phases(monkeypatch)
    made = start_from(study, start, 4, rows)
    assert [run.steps for run in second.runs] == [9], "the first phase was made before"
    assert second.runs[0].init == FromHF(str(tmp_path / "starts" / "two-4" / "exported-0"))
    assert made == tmp_path / "starts" / "two-4" / "exported-1" and start_from(study, start, 4, rows) == made
    assert len(second.runs) == 1 and sorted(path.name for path in made.parent.iterdir()) == [
        "exported-0",
        "exported-1",
        "phases.json",
    ]


def test_what_a_moved_study_left_unfinished_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase that names the one before by another path could not go on; one that begins from nothing could."""
    study = small(starts=(Start("two", (RECIPE, RECIPE)),), arms=())
    phases, (start,) = Phases(monkeypatch), study.starts
    rows = Rows(tmp_path, study)
    begun = [rows.start("two", 4) / f"phase-{number}" for number in (0, 1)]
    elsewhere = study.phase_of(start, 1, 4, "/elsewhere/exported-0")
    for folder, config in zip(begun, (study.phase_of(start, 0, 4, ""), elsewhere), strict=True):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(dumps(config))
    with pytest.raises(FileExistsError, match="phase-0"):
        start_from(study, start, 4, rows)
    shutil.rmtree(begun[0])
    start_from(study, start, 4, rows)
    assert [Path(run.output_dir) for run in phases.runs] == begun


def test_a_start_without_phases_makes_nothing(tmp_path: Path) -> None:
    study = small()
    start_from(study, study.starts[0], 0, Rows(tmp_path, study))
    assert list(tmp_path.iterdir()) == []


class Ending(StopRequest):
    """The process is asked to end after the first step of a run."""

    def finished(self) -> None:
        super().finished()
        os.kill(os.getpid(), signal.SIGTERM)
        # A thread hears it; on a busy machine the next step would begin before.
        deadline = time.monotonic() + 60
        while self.asked is None and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.mark.slow
def test_a_small_study_is_run_ended_and_resumed(tmp_path: Path, capsys: Any) -> None:
    """A run that is ended in its middle gives the row, number for number, that it gives uninterrupted; so does one in a
    study that was moved since, where it begins anew."""
    routed = ModelOptions(mechanisms=(Gaze(FixedRegions(2, 2), max_regions=4, top_k=1),))
    arms = (Arm("learned", "learned", trained=False), Arm("on", "learned", "learned", routed))
    study = small(arms=arms, seeds=(0,))
    learned, on = study.cells()
    whole, ended = (Rows(tmp_path / name, study) for name in ("whole", "ended"))
    assert run_missing(study, whole, [learned], make_row, silent) == Outcome([], [])
    shutil.copytree(whole.folder, ended.folder)
    assert run_missing(study, whole, [on], make_row, silent) == Outcome([], [])

    with Ending() as stop, pytest.raises(Interrupted):
        run_missing(study, ended, [on], functools.partial(make_row, stop=stop), silent)
    assert ended.read(on) is None and steps_in(ended.work(on) / "run" / "checkpoints") == [1]
    shutil.copytree(ended.folder, tmp_path / "moved")
    moved = Rows(tmp_path / "moved", study)
    assert run_missing(study, ended, [on], make_row, silent) == Outcome([], [])
    assert "was moved" not in capsys.readouterr().out
    assert run_missing(study, moved, [on], make_row, silent) == Outcome([], [])
    assert "the study was moved since this run began, so the run begins anew" in capsys.readouterr().out

    one = whole.read(on)
    assert one is not None
    for other in (ended.read(on), moved.read(on)):
        assert other is not None and dataclasses.replace(other, seconds=one.seconds) == one
    assert [step for step, _ in one.curves["loss"]] == [1.0, 2.0]
    assert [step for step, _ in one.curves["score"]] == [2.0]
    assert one.parameters["added"] == 0 and one.samples == {"mosaic": 4}
    base = whole.read(learned)
    assert base is not None and base.curves == {} and base.made_with["trained"] is False
    assert base.findings == {"mosaic/entries": 9, "mosaic/visual": 9}
    assert one.findings["mosaic/visual"] == 9 > one.findings["mosaic/entries"]
    # A cell of a mosaic lies in one region of four.
    assert one.findings["mosaic/chance"] == 0.25 and 0 <= one.findings["mosaic/on_evidence"] <= 1
    assert "learned" in write(tmp_path, study, summarise(study, whole.all()))
