"""A run that is killed, or told to end while it saves, then the same command: the loss curve is that of a run that was
left alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rave_jax.observe.metrics import OF_TIME, read_jsonl
from tests import programs

CONFIG = "tests/resume/small_run.py"


def start(repo: Path, folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", CONFIG, "--output_dir", str(folder), "--simulated_devices", "2", *overrides]
    return subprocess.Popen(
        command, cwd=repo, env=programs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(job: subprocess.Popen) -> str:
    output = job.communicate(timeout=500)[0]
    assert job.returncode == 0, output[-3000:]
    return output


def signal_at(job: subprocess.Popen, folder: Path, step: int, delay: float, name: int = signal.SIGKILL) -> None:
    """Signal the process as soon as its metrics show `step` steps, and a little later."""
    metrics = folder / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= step):
        time.sleep(0.002)
    time.sleep(delay)
    assert job.poll() is None, f"the run ended before the signal: {job.communicate()[0][-2000:]}"
    job.send_signal(name)


def curve(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name not in OF_TIME}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


STEPS = ("--steps", "45")


@pytest.fixture(scope="module")
def left_alone(repo, tmp_path_factory):
    """The loss curve of a run that was left alone."""
    folder = tmp_path_factory.mktemp("left") / "alone"
    finish(start(repo, folder, *STEPS))
    rows = curve(folder)
    assert [row["step"] for row in rows] == list(range(1, 46))
    return rows


@pytest.mark.slow
def test_killed_again_and_again(repo, tmp_path, left_alone):
    """At moments that fall into steps and saves alike, whether threads load rows or a process of its own."""
    chance = random.Random(0)
    for lowest, processes in ((1, "0"), (11, "1"), (22, "0")):
        job = start(repo, tmp_path / "killed", *STEPS, "--data.processes", processes)
        signal_at(job, tmp_path / "killed", chance.randint(lowest, lowest + 15), chance.random() * 0.05)
        job.wait()
    assert "continuing after step" in finish(start(repo, tmp_path / "killed", *STEPS))
    assert curve(tmp_path / "killed") == left_alone


OF_EVAL = {"every": 3, "samples": 8, "rows": 8, "looks": 0, "pictures": 0}
EVALUATED = (
    "--final",
    "Eval",
    "Report",
    *(word for name, x in OF_EVAL.items() for word in (f"--final.0.{name}", str(x))),
)


@pytest.mark.slow
def test_killed_in_evaluations_it_continues_bit_for_bit(repo, tmp_path):
    """A moment after a step behind which an evaluation is run: the first compiles, the others are quick."""
    finish(start(repo, tmp_path / "alone", *EVALUATED))
    job = start(repo, tmp_path / "killed", *EVALUATED)
    signal_at(job, tmp_path / "killed", 3, 1.0)
    job.wait()
    job = start(repo, tmp_path / "killed", *EVALUATED)
    signal_at(job, tmp_path / "killed", 8, 0.1)
    job.wait()
    finish(start(repo, tmp_path / "killed", *EVALUATED))
    rows = curve(tmp_path / "alone")
    assert [row["step"] for row in rows if "loss" not in row] == [3, 6, 9, 10]
    assert curve(tmp_path / "killed") == rows
    steps = tmp_path / "killed" / "evaluation" / "heldout" / "steps"
    assert {path.name for path in steps.iterdir()} == {"3", "6", "9", "10"}


@pytest.mark.slow
def test_told_to_end_while_it_saves_it_ends_with_a_whole_checkpoint(repo, tmp_path, left_alone):
    """Each step is saved, and the signal comes a moment after a step: the save under way is finished first."""
    often = (*STEPS, "--save_every", "1")
    chance = random.Random(0)
    for lowest in (2, 10):
        job = start(repo, tmp_path / "stopped", *often)
        signal_at(job, tmp_path / "stopped", lowest, chance.random() * 0.02, signal.SIGTERM)
        output = job.communicate(timeout=100)[0]
        assert job.returncode == 143, output[-3000:]
        names = {path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()}
        steps = [int(name) for name in names if name.isdecimal()]
        assert names == set(map(str, steps)), "nothing is half-written"
        assert f"stopped after step {max(steps)}, which is saved" in output
    finish(start(repo, tmp_path / "stopped", *often))
    assert curve(tmp_path / "stopped") == left_alone
