"""Rows of a study: a file for every finished run, written whole, and who is at work on the others.

    OUT/rows/ARM-SEED.json    a finished run: scores, curves, what it was made with
    OUT/work/ARM-SEED/        an unfinished one: its run directory, and a lock held by the job that trains it
    OUT/starts/NAME-SEED/     phases that arms share and what they are, and a lock while they are made

A row says what it was made with, and one of another recipe is refused: rows of one table must be of one study. Jobs on
any number of machines share the work by locks on these folders, where the file system has locks (training/lock.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rave_jax import config as configs
from rave_jax.config import ConfigError, require
from rave_jax.files import read_text
from rave_jax.study.config import Cell, Judged, Start, Study
from rave_jax.training.config import TrainConfig, differences
from rave_jax.training.lock import InUse, only_job

FORMAT = 1
PHASES = "phases.json"
"""What the phases of a start are, beside what they gave."""
ELSEWHERE = "the start's phases"
"""In place of the directory that a run's weights come from, in what a row says: a study may be moved."""


@dataclass(frozen=True)
class Row:
    """What is kept of a finished run."""

    arm: str = ""
    """Name of the arm."""
    seed: int = 0
    """Seed of the run."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Share of right answers of each task."""
    samples: Mapping[str, int] = field(default_factory=dict)
    """Samples of each task."""
    findings: Mapping[str, float] = field(default_factory=dict)
    """Further numbers, by name."""
    curves: Mapping[str, list[list[float]]] = field(default_factory=dict)
    """Points (step, value) of each curve."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Numbers in all parameters of the model, and in those that the arm adds to the plain model."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What took how long, in this job."""
    where: str = ""
    """Device, number of devices, version of jax."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """The phases, the run and the tasks, as JSON."""

    @property
    def score(self) -> float:
        """Mean over tasks of the share of right answers."""
        return sum(self.scores.values()) / len(self.scores)


def made_with(study: Study, cell: Cell) -> dict[str, Any]:
    """What a row of this cell is made with: everything that changes a number of it."""
    start = study.start_of(cell.arm)
    tasks = [_task_json(task) for task in study.tasks]
    return {
        "phases": phases_json(study, start, cell.seed),
        "run": configs.to_json(study.run_of(cell, ELSEWHERE)),
        "trained": cell.arm.trained,
        "tasks": tasks,
        "score_every": start.score_every,
        "score_samples": study.score_samples,
    }


def phases_json(study: Study, start: Start, seed: int) -> list[dict[str, Any]]:
    """The phases of a start under a seed, as JSON."""
    numbers = range(len(start.phases))
    return [configs.to_json(study.phase_of(start, number, seed, ELSEWHERE)) for number in numbers]


def _task_json(task: Judged) -> dict[str, Any]:
    return configs.to_json(dataclasses.replace(task, rows=1))  # samples at once change no number


class Rows:
    """The folder of a study.

    Args:
        folder: OUT.
        study: what the rows have to be of.
    """

    def __init__(self, folder: Path, study: Study):
        self.folder, self._study = folder, study

    def file(self, cell: Cell) -> Path:
        """The row of a cell."""
        return self.folder / "rows" / f"{cell.name}.json"

    def work(self, cell: Cell) -> Path:
        """The folder of an unfinished run."""
        return self.folder / "work" / cell.name

    def start(self, name: str, seed: int) -> Path:
        """The folder of a start's phases."""
        return self.folder / "starts" / f"{name}-{seed}"

    def read(self, cell: Cell) -> Row | None:
        """The row of a cell; None where it is not finished.

        Raises:
            ConfigError: the file is none of ours, or of another recipe.
        """
        file = self.file(cell)
        if not file.exists():
            return None
        try:
            data = json.loads(read_text(file))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{file}: cannot be read as a row of a study ({error}); remove it to run it again"
            ) from error
        ours = isinstance(data, dict) and data.pop("format", None) == FORMAT and _is_row(data)
        expected = "what `rave-jax study` writes; remove the file"
        require(ours, str(file), "no row of a study in this format", expected)
        row = Row(**data)
        fault = _other(row.made_with, made_with(self._study, cell), str(file))
        if fault:
            raise ConfigError(f"{file} is a row of another study ({fault}); give another --out, or remove the file")
        asked = {task.name for task in self._study.tasks}
        shares = set(row.scores) == asked and all(0 <= score <= 1 for score in row.scores.values())
        require(shares and (row.arm, row.seed) == (cell.arm.name, cell.seed), str(file), "no row of this run", expected)
        return row

    def write(self, cell: Cell, row: Row) -> None:
        """Put a row in place, in one step.

        Raises:
            OSError: it cannot be written.
        """
        _write(self.file(cell), json.dumps({"format": FORMAT, **dataclasses.asdict(row)}))

    def begin_start(self, start: Start, seed: int) -> None:
        """Say in the folder of a start what its phases are, or check that it is what stands there.

        Raises:
            ConfigError: the folder is of other phases.
            OSError: it cannot be written.
        """
        file = self.start(start.name, seed) / PHASES
        phases = {"phases": phases_json(self._study, start, seed), "run": configs.to_json(TrainConfig())}
        if not file.exists():
            _write(file, json.dumps(phases))
            return
        try:
            fault = _other(json.loads(read_text(file)), phases, str(file))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: cannot be read ({error}); remove its folder to make the start again") from error
        if fault:
            raise ConfigError(
                f"{file.parent} holds what other phases gave ({fault}); give another --out, or remove the folder"
            )

    def all(self) -> dict[str, dict[int, Row]]:
        """The finished rows of every arm, by seed.

        Raises:
            ConfigError: as `read`.
        """
        found: dict[str, dict[int, Row]] = {arm.name: {} for arm in self._study.arms}
        for cell in self._study.cells():
            row = self.read(cell)
            if row is not None:
                found[cell.arm.name][cell.seed] = row
        return found


def _is_row(data: Mapping[str, Any]) -> bool:
    """Has what was read the fields of a row, with values of their types?"""
    if set(data) != {f.name for f in dataclasses.fields(Row)}:
        return False
    tables = [data[name] for name in ("scores", "samples", "findings", "parameters", "seconds")]
    mappings = all(isinstance(one, dict) for one in (*tables, data["curves"], data["made_with"]))
    numbers = mappings and all(_finite(x) for table in tables for x in table.values())
    curves = mappings and all(isinstance(points, list) for points in data["curves"].values())
    points = [point for one in data["curves"].values() for point in one] if curves else []
    pairs = all(isinstance(point, list) and len(point) == 2 and all(map(_finite, point)) for point in points)
    return numbers and curves and pairs and {"all", "added"} <= set(data["parameters"])


def _finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def _write(file: Path, text: str) -> None:
    """Put a file in place, in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(f"{text}\n", encoding="utf-8")
    os.replace(part, file)


@contextlib.contextmanager
def claim(folder: Path) -> Generator[bool]:
    """Hold a folder for this job, made where it is missing; gives False where another job holds it. For one process.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(only_job(folder))
        except (InUse, FileNotFoundError):  # or the job that held it has finished and removed it since
            yield False
            return
        yield True


def _other(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> str:
    """What makes a row one of another recipe; "" where nothing does."""
    try:
        before, after = (_runs(one, where) for one in (old, new))
    except ConfigError as error:
        return str(error)
    if len(before) != len(after):
        return f"the start has {len(after) - 1} phases, had {len(before) - 1}"
    for number, (then, now) in enumerate(zip(before, after, strict=True)):
        lines = differences(then, now)
        lines += [f"steps is {now.steps}, was {then.steps}"] if then.steps != now.steps else []
        if lines:
            what = "run" if number == len(after) - 1 else f"phases.{number}"
            return "; ".join(f"{what}.{line}" for line in lines[:3])
    rest = [name for name in new if name not in ("phases", "run")]
    lines = [line for name in rest for line in configs.differing(name, _normal(old.get(name)), _normal(new[name]))]
    return "; ".join(lines[:3])


def _runs(made: Mapping[str, Any], where: str) -> list[TrainConfig]:
    """The phases and the run, with fields that have come since at their defaults."""
    data = [*made.get("phases", []), made.get("run")]
    return [configs.from_json(TrainConfig, one, f"{where}: made_with") for one in data]


def _normal(value: Any) -> Any:
    """Tasks with fields that have come since at their defaults; others as they are."""
    if not isinstance(value, list):
        return value
    try:
        return [configs.to_json(configs.from_json(Judged, one)) for one in value]
    except ConfigError:
        return value
