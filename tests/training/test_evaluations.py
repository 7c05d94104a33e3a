"""Evaluations between steps: training does not notice them, nothing is compiled twice, and whatever ends a run in
between, the same command makes what is lacking and nothing twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.evaluation.config import Eval, Floor, Report
from rave_jax.evaluation.report import write_report
from rave_jax.evaluation.subject import ModelSubject
from rave_jax.evaluation.suites import Evaluation
from rave_jax.models.parameters import named_parameters
from rave_jax.observe.metrics import OF_TIME, Row, read_jsonl
from rave_jax.parallel.stopping import Interrupted, StopRequest
from rave_jax.training.config import TrainConfig
from rave_jax.training.run import load_run, train
from tests.resume.small_run import get_config

STEPS, EVERY = 6, 2
SIZES = {"samples": 8, "rows": 8, "tokens": 64, "patches": 64, "max_new_tokens": 2}
HELDOUT = Eval("heldout", **SIZES, looks=2, pictures=1, routes=2, floor=Floor(grey=False))


def config(folder: Path, **changes: Any) -> TrainConfig:
    """Six steps with an evaluation after each second, and a checkpoint after the fourth."""
    changes = {"steps": STEPS, "save_every": 4, "every": EVERY} | changes
    heldout = dataclasses.replace(
        HELDOUT, **{name: changes.pop(name) for name in ("every", "samples") if name in changes}
    )
    final = changes.pop("final", (heldout, Report()))
    return dataclasses.replace(get_config(), output_dir=str(folder), tensorboard=False, final=final, **changes)


def rows(folder: Path) -> list[Row]:
    return [
        {name: value for name, value in row.items() if name not in OF_TIME}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


def losses(folder: Path) -> list[Row]:
    return [row for row in rows(folder) if "loss" in row]


def scores(folder: Path) -> list[Row]:
    return [row for row in rows(folder) if "loss" not in row]


def assert_same_weights(one: Path, two: Path) -> None:
    numbers = [
        {name: np.asarray(param[...]) for name, param in named_parameters(load_run(folder).model).items()}
        for folder in (one, two)
    ]
    jax.tree.map(np.testing.assert_array_equal, *numbers)


def results(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "evaluation" / "heldout" / "steps").iterdir())


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Generator[list[int]]:
    """The number of programs that each evaluation compiles."""
    compiled = 0
    found: list[int] = []
    original = Evaluation.run

    def count(event: str, _seconds: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    def run(self: Evaluation, *arguments: Any, **named: Any) -> Any:
        before = compiled
        try:
            return original(self, *arguments, **named)
        finally:
            found.append(compiled - before)

    jax.monitoring.register_event_duration_secs_listener(count)
    monkeypatch.setattr(Evaluation, "run", run)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A run with evaluations between steps, and the number of programs that each of them compiled."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    # The run may not find programs that an earlier one left: with slow tests beside, there is one.
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch, counted(patch) as compiled:
        train(config(folder))
    return folder, compiled


@pytest.fixture(scope="module")
def copied(evaluated: tuple[Path, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copies of that run, to continue."""

    def copy() -> Path:
        return shutil.copytree(evaluated[0], tmp_path_factory.mktemp("copied") / "run")

    return copy


def test_training_is_that_of_a_run_without_them(evaluated: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, _ = evaluated
    alone = tmp_path / "alone"
    train(config(alone, every=None))
    assert losses(folder) == rows(alone) and len(rows(alone)) == STEPS
    assert_same_weights(folder, alone)
    ours, theirs = (path / "evaluation" / "heldout" for path in (folder, alone))
    assert (ours / "predictions.jsonl").read_bytes() == (theirs / "predictions.jsonl").read_bytes()
    found = [json.loads((path / "summary.json").read_text()) | {"seconds": 0} for path in (ours, theirs)]
    assert found[0] == found[1], "after the last step both say the same"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()} | {"steps"}
    page = (folder / "report.md").read_text()
    assert "### During training" in page and all(f"| {step} | " in page for step in (2, 4, 6))
    stale = alone / "evaluation" / "heldout" / "steps" / "4"
    shutil.copytree(folder / "evaluation" / "heldout" / "steps" / "4", stale)
    write_report(Report(), alone)
    assert "During training" not in (alone / "report.md").read_text(), (
        "a folder without a row is of no step of this run"
    )


def test_each_time_is_a_folder_and_a_row(evaluated: tuple[Path, list[int]]) -> None:
    folder, _ = evaluated
    assert results(folder) == ["2", "4", "6"]
    assert [row["step"] for row in rows(folder)] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    for row in scores(folder):
        result = folder / "evaluation" / "heldout" / "steps" / str(row["step"])
        summary = json.loads((result / "summary.json").read_text())
        assert row["eval/heldout/score"] == summary["total"]["score"]
        assert row["eval/heldout/looking/on_picture"] == summary["looking"]["on_picture"]
        assert len(summary["pictures"]) == 1 and (result / summary["pictures"][0]).is_file()


def test_nothing_is_compiled_the_second_time(evaluated: tuple[Path, list[int]]) -> None:
    _, compiled = evaluated
    assert len(compiled) == 3 and compiled[0] > 0 and compiled[1:] == [0, 0]


@pytest.mark.parametrize("call", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_told_to_end_during_an_evaluation_it_saves_and_continues(
    evaluated: tuple[Path, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """In the first evaluation, before a step that is saved, or in the second, before one that is not."""
    folder, stop = tmp_path / "run", StopRequest(poll=0.05)
    original, calls = ModelSubject.answer, 0

    def answer(self: ModelSubject, samples: Sequence[Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
            while stop.asked is None:
                time.sleep(0.01)
        return original(self, samples)

    monkeypatch.setattr(ModelSubject, "answer", answer)
    step = EVERY * call
    with stop, pytest.raises(Interrupted, match=rf"SIGTERM: stopped after step {step}, which is saved"):
        train(config(folder), stop)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {str(step)}
    assert results(folder) == ["2"] * (step > EVERY), "nothing is half-written"
    monkeypatch.setattr(ModelSubject, "answer", original)
    with counted(monkeypatch) as made:
        train(config(folder))
    assert len(made) == (STEPS - step) // EVERY + 1, "those that are complete are not run again"
    assert rows(folder) == rows(evaluated[0])
    assert_same_weights(folder, evaluated[0])
    assert results(folder) == results(evaluated[0])


def test_after_a_kill_what_is_complete_is_taken(
    evaluated: tuple[Path, list[int]], copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As killed between the evaluation of step 6 and its checkpoint: half a row is written."""
    folder = copied()
    shutil.rmtree(folder / "checkpoints" / "6")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    with counted(monkeypatch) as made:
        train(config(folder))
    assert made == [] and rows(folder) == rows(evaluated[0]), "its result was complete"


@pytest.mark.slow
def test_a_result_that_is_not_complete_is_made_again(
    evaluated: tuple[Path, list[int]], copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    steps = folder / "evaluation" / "heldout" / "steps"
    shutil.rmtree(folder / "checkpoints" / "6")
    (steps / "6").rename(steps / "6.partial")
    with counted(monkeypatch) as made:
        train(config(folder))
    assert len(made) == 1 and results(folder) == ["2", "4", "6"]
    assert rows(folder) == rows(evaluated[0])


@pytest.mark.slow
def test_results_of_another_evaluation_or_another_course_are_not_taken(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more steps the learning rate takes another course, so what was found after the checkpoint does not hold."""
    folder = copied()
    shutil.rmtree(folder / "checkpoints" / "6")
    with counted(monkeypatch) as made:
        train(config(folder, steps=8))
    assert len(made) == 2 and results(folder) == ["2", "4", "6", "8"]
    assert [row["step"] for row in scores(folder)] == [2, 4, 6, 8]
    with counted(monkeypatch) as made:
        train(config(folder, steps=8, every=3))
    assert made == [], "how often is not what an evaluation is"
    with counted(monkeypatch) as made:
        train(config(folder, steps=8, samples=7))
    assert len(made) == 1
    assert json.loads((folder / "evaluation" / "heldout" / "summary.json").read_text())["total"]["samples"] == 7


@pytest.mark.parametrize(
    ("every", "said"),
    [
        (0, "every is 0, expected a number from 1"),
        (-2, "every is -2"),
        (True, "every is True"),
        (7, r"final\.0\.every is 7, expected at most the run's 6 steps"),
    ],
)
def test_times_that_make_no_sense_are_refused(tmp_path: Path, every: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, every=every)


def test_two_evaluations_of_one_name_are_refused(tmp_path: Path) -> None:
    again = dataclasses.replace(HELDOUT, every=2)
    with pytest.raises(ConfigError, match=r"final\.1\.name is 'heldout', expected a name that no other evaluation"):
        config(tmp_path, final=(HELDOUT, again))


def test_budgets_that_no_sample_fits_are_refused_before_the_first_step(tmp_path: Path) -> None:
    small = dataclasses.replace(HELDOUT, tokens=8, every=2)
    with pytest.raises(
        ConfigError, match=r"final\.1: evaluation heldout: no sample can be asked; the first: .*tokens 8"
    ):
        train(config(tmp_path / "run", final=(Report(), small)))
    assert not (tmp_path / "run").exists()


def test_caches_that_do_not_fit_beside_training_are_refused_before_the_first_step(tmp_path: Path) -> None:
    large = dataclasses.replace(HELDOUT, rows=2**16, tokens=2**18, every=2)
    said = r"parameters, optimizer state and the slots of final\.0 \(rows, tokens, patches\) need .* GB of memory"
    with pytest.raises(ConfigError, match=said):
        train(config(tmp_path / "run", final=(large,)))
    assert not (tmp_path / "run").exists()
