"""The work of a study: shared phases, one run after another, each with its row."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.naming import extra_parameters
from rave_jax.checkpoint.saved_step import steps_in
from rave_jax.config import ConfigError
from rave_jax.inference import NotFinite
from rave_jax.models.parameters import count, named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.observe.metrics import read_jsonl
from rave_jax.parallel import agree, hosts
from rave_jax.parallel.mesh import make_mesh
from rave_jax.parallel.stopping import StopRequest
from rave_jax.study.config import Cell, Start, Study
from rave_jax.study.judge import Judge, mean_score
from rave_jax.study.rows import Row, Rows, claim, made_with
from rave_jax.training.config import TrainConfig
from rave_jax.training.directory import RunDirectory
from rave_jax.training.loop import NonFiniteError
from rave_jax.training.run import load_run, train

POLL = 2.0
"""Seconds between two looks at phases that another job makes."""

Make = Callable[[Study, Cell, Rows], Row]


class Outcome(NamedTuple):
    """How the work ended: what failed and why, and what other jobs are at."""

    failed: list[str]
    elsewhere: list[str]


def run_missing(study: Study, rows: Rows, cells: Sequence[Cell], make: Make, say: Callable[[str], None]) -> Outcome:
    """Run what has no row yet, one after the other. Every process of a job calls it alike; the first one writes.

    A run whose numbers are not finite is left out and named in the outcome; the others go on.

    Args:
        study: what is run.
        rows: its folder.
        cells: the runs that are wanted, in order.
        make: trains and judges one run.
        say: takes a line for each row.

    Raises:
        ConfigError: a row of another study, or a run that cannot be made.
    """
    outcome = Outcome([], [])
    for cell in cells:
        if _finished(rows, cell):
            continue
        with _claimed(rows.work(cell)) as mine:
            if not mine:
                outcome.elsewhere.append(cell.name)
                continue
            if not _finished(rows, cell):  # else another job has made it since
                try:
                    row = make(study, cell, rows)
                except (NonFiniteError, NotFinite) as error:
                    outcome.failed.append(f"{cell.name}: {error}")
                    continue
                agree.on_first(lambda cell=cell, row=row: rows.write(cell, row), OSError)
                say(f"{cell.arm.name}, seed {cell.seed}: {row.score:.1%} ({sum(row.seconds.values()):.0f} s)")
            if hosts.is_first() and not study.keep_runs:
                shutil.rmtree(rows.work(cell), ignore_errors=True)
        jax.clear_caches()
    return outcome


def make_row(study: Study, cell: Cell, rows: Rows, stop: StopRequest | None = None) -> Row:
    """Train and judge one run: from its start, or from where it was interrupted.

    Args:
        study, cell, rows: which run, and where it is kept.
        stop: of the job, which has one for all runs: processes would not agree by two.

    Raises:
        ConfigError, StoreError, NonFiniteError, Interrupted: as `train`.
        NotFinite: the trained model's answers are not finite.
    """
    began = time.monotonic()
    start = study.start_of(cell.arm)
    before = start_from(study, start, cell.seed, rows, stop)
    since = time.monotonic()
    folder = rows.work(cell) / "run"
    config = dataclasses.replace(study.run_of(cell, str(before)), output_dir=str(folder))
    if start.phases:
        agree.on_first(lambda: _forget_moved(folder, config), ConfigError, OSError)
    mesh = make_mesh(config.mesh)
    if cell.arm.trained:
        train(config, stop)
        trained = load_run(folder, mesh)
        model, processor = trained.model, trained.processor
    else:
        model = import_hf(before, config.model, mesh, jax.random.key(config.seed))
        processor = config.data.processor(before, config.model.layout)
    judged = time.monotonic()
    judge = Judge(study, cell.seed, model, processor, mesh)
    scores = judge.scores(model)
    where = (jax.devices()[0].device_kind, f"{jax.device_count()} devices", config.model.compute_dtype)
    return Row(
        arm=cell.arm.name,
        seed=cell.seed,
        scores=scores,
        samples=judge.samples,
        findings=judge.findings(model),
        curves=_curves(study, cell, folder, judge, config.steps) if cell.arm.trained else {},
        parameters=_parameters(model),
        seconds={
            "start": round(since - began, 1),
            "training": round(judged - since, 1),
            "judging": round(time.monotonic() - judged, 1),
        },
        where=", ".join((*where, f"jax {jax.__version__}")),
        made_with=made_with(study, cell),
    )


def start_from(study: Study, start: Start, seed: int, rows: Rows, stop: StopRequest | None = None) -> Path:
    """The directory in HuggingFace format that the phases of a start give under a seed. It is made where it is not
    there yet; where another job makes it, this waits. Without phases nothing is there, and nothing will be read."""
    folder = rows.start(start.name, seed)
    made = folder / f"exported-{len(start.phases) - 1}"
    if start.phases:
        agree.on_first(lambda: rows.begin_start(start, seed), ConfigError, OSError)
    while start.phases and not agree.on_first(made.is_dir):
        with _claimed(folder) as mine:
            if mine:
                _make_phases(study, start, seed, folder, stop)
        if not mine:
            time.sleep(POLL)
    return made


def _make_phases(study: Study, start: Start, seed: int, folder: Path, stop: StopRequest | None) -> None:
    before = ""
    for number in range(len(start.phases)):
        exported, run = folder / f"exported-{number}", folder / f"phase-{number}"
        if not agree.on_first(exported.is_dir):
            phase = dataclasses.replace(study.phase_of(start, number, seed, before), output_dir=str(run))
            if before:
                agree.on_first(functools.partial(_forget_moved, run, phase), ConfigError, OSError)
            train(phase, stop)
            export_hf(load_run(run, make_mesh(phase.mesh)).model, exported, run / "model")
        before = str(exported)
        if hosts.is_first() and not study.keep_runs:
            shutil.rmtree(run, ignore_errors=True)


def _forget_moved(folder: Path, config: TrainConfig) -> None:
    """Remove an unfinished run that began from what phases gave, and names it by another path than this: the study was
    moved, so the run could not go on."""
    directory = RunDirectory(folder)
    if directory.config.exists() and directory.read_config().init != config.init:
        print(f"{folder}: the study was moved since this run began, so the run begins anew")
        shutil.rmtree(folder)


def _curves(study: Study, cell: Cell, folder: Path, judge: Judge, steps: int) -> dict[str, list[list[float]]]:
    directory = RunDirectory(folder)
    logged = [row for row in read_jsonl(directory.metrics) if "loss" in row] if hosts.is_first() else []
    curves = {"loss": [[float(row["step"]), float(row["loss"])] for row in logged]}
    every = study.start_of(cell.arm).score_every
    if every is None:
        return curves
    points = []
    for step in agree.on_first(lambda: steps_in(directory.checkpoints)):
        if step % every == 0 or step == steps:
            weights = load_run(folder, make_mesh(study.mesh), step).model
            points.append([float(step), mean_score(judge.scores(weights, study.score_samples))])
    return curves | {"score": points}


def _parameters(model: Vlm) -> dict[str, int]:
    named = named_parameters(model)
    return {"all": count(model), "added": sum(named[path].size for path in extra_parameters(model))}


def _finished(rows: Rows, cell: Cell) -> bool:
    return agree.on_first(lambda: rows.read(cell) is not None, ConfigError)


@contextlib.contextmanager
def _claimed(folder: Path) -> Generator[bool]:
    """`claim` by the first process, for all of the job."""
    with contextlib.ExitStack() as held:
        yield agree.on_first(lambda: held.enter_context(claim(folder)), OSError)
