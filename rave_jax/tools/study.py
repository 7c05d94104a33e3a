"""`rave-jax study`: run what is missing of a study, and say what its rows decide."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path

import jax

from rave_jax.checkpoint.store import StoreError
from rave_jax.command_line import STUDIES, config_file
from rave_jax.config import load_file, local_path, require
from rave_jax.observe.messages import plain_messages
from rave_jax.parallel import hosts
from rave_jax.parallel.stopping import StopRequest
from rave_jax.study.config import Study
from rave_jax.study.page import HTML, MARKDOWN, write
from rave_jax.study.rows import Rows
from rave_jax.study.run import Outcome, make_row, run_missing
from rave_jax.study.summary import summarise
from rave_jax.tools.job import EXIT_FAILED, run_job

PROGRAM = "rave-jax study"
COMPILED = "compiled"
"""Folder of compiled programs in that of the study: arms and seeds of equal shapes share them."""


def load(config: str, out: Path | None) -> Study:
    """The study of a file, in another folder if one is given.

    Raises:
        ConfigError: there is no such file, or it holds no study.
    """
    path = config_file(config, STUDIES)
    study = load_file(path)
    require(isinstance(study, Study), f"get_config() of {path}", study, "a Study; `rave-jax train` takes a TrainConfig")
    require(bool(study.arms), f"{path}: arms", study.arms, "at least one arm to run")
    return study if out is None else dataclasses.replace(study, output_dir=str(out))


def study_command(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code. End the program with it by `stopping.leave`."""
    plain_messages()
    study = load(arguments.config, arguments.out)
    cells = study.cells(arguments.arm, arguments.seed)
    folder = local_path(study.output_dir, "output_dir").expanduser().resolve()
    rows = Rows(folder, study)
    outcome = Outcome([], [])

    def work(stop: StopRequest) -> None:
        nonlocal outcome
        rows.all()  # rows of another study are named before anything is run
        if not arguments.report:
            if jax.config.jax_compilation_cache_dir is None:
                jax.config.update("jax_compilation_cache_dir", str(folder / COMPILED))
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
            outcome = run_missing(study, rows, cells, functools.partial(make_row, stop=stop), _say)
        if hosts.is_first():
            try:
                text = write(folder, study, summarise(study, rows.all()))
            except OSError as error:
                raise StoreError(f"cannot write to {error.filename or folder}: {error.strerror or error}") from error
            print(f"{text}\n{folder / MARKDOWN}\n{folder / HTML}")

    code = run_job(PROGRAM, study.hosts, study.simulated_devices, work)
    for what, names in (("another job runs", outcome.elsewhere), ("not finite", outcome.failed)):
        for name in names:
            _say(f"{what}: {name}")
    return code or (EXIT_FAILED if outcome.failed else 0)


def _say(line: str) -> None:
    if hosts.is_first():
        print(line, flush=True)
