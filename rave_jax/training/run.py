"""A whole run: directory, weights, training, what comes after it; and reading a run's model back."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.store import Store, StoreError, check_writable, local_bytes
from rave_jax.checkpoint.target import abstract_model
from rave_jax.config import ConfigError
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.evaluation.config import Eval, Report
from rave_jax.evaluation.report import write_report
from rave_jax.evaluation.suites import evaluate
from rave_jax.evaluation.summary import print_summary
from rave_jax.models.vlm import Vlm
from rave_jax.observe.metrics import JsonlWriter, MetricsWriter, TensorBoardWriter
from rave_jax.observe.progress import ProgressReport
from rave_jax.observe.tables import print_parameters
from rave_jax.parallel import hosts
from rave_jax.parallel.mesh import MeshConfig, layout_line, make_mesh
from rave_jax.parallel.sharding import use_mesh
from rave_jax.parallel.shared_disk import check_shared
from rave_jax.parallel.stopping import StopRequest
from rave_jax.parallel.watchdog import Watchdog
from rave_jax.training.config import TrainConfig
from rave_jax.training.directory import RunDirectory, run_directory
from rave_jax.training.init import model_config, prepare, source_of
from rave_jax.training.loop import Loop, Schedule
from rave_jax.training.session import Session, group_rows, make_session
from rave_jax.training.state import ModelGraph, TrainState, parameters_of, parameters_target, state_of

log = logging.getLogger(__name__)


class LoadedRun(NamedTuple):
    """A run's model, ready to answer.

    Fields:
        config: the run's config.
        model: with its trained weights on the mesh.
        processor: for its prompts.
        mesh: where it lies.
        step: steps it was trained for.
    """

    config: TrainConfig
    model: Vlm
    processor: Processor
    mesh: Mesh
    step: int


def train(config: TrainConfig, stop: StopRequest) -> None:
    """Run or continue an experiment. Call `hosts.start` first.

    Args:
        config: what to run.
        stop: whether the job is to end.

    Raises:
        ConfigError: the config does not fit the machine, the checkpoint, the data or the run directory.
        StoreError: the run directory cannot be written.
        NonFiniteError: a loss or gradient was not finite.
        Interrupted: the job was asked to end; the state of the last finished step is saved.
    """
    with Watchdog(config.hosts.step_timeout, stop) as watchdog:
        _run(config, watchdog, stop)


def _run(config: TrainConfig, watchdog: Watchdog, stop: StopRequest) -> None:
    directory = run_directory(config.output_dir)
    mesh = make_mesh(config.mesh)
    with use_mesh(mesh):
        # Made first: a config that makes no model, or no session of it, leaves nothing behind.
        session = make_session(
            abstract_model(model_config(config.init, directory.model), config.model),
            config.optimizer,
            mesh,
            steps=config.steps,
            rows=config.data.rows,
            loss_chunk=config.loss_chunk,
        )
        _claim(directory, config)
        kept = min(config.keep, -(-config.steps // config.save_every)) + 1
        present = sum(f.stat().st_size for f in directory.checkpoints.rglob("*") if f.is_file())
        check_writable(directory.checkpoints, kept * local_bytes(session.state) - present)
        if hosts.is_first():
            log.info(layout_line(config.mesh))
            print_parameters(group_rows(session, config.optimizer))
        processor = config.data.processor(directory.model, config.model.layout)
        with Store(directory.checkpoints, config.keep) as store:
            state = _train(config, session, directory, store, processor, watchdog, stop)
    model = session.graph.merge(state.trained | state.frozen)
    del state  # the optimizer's part of it is not needed any more
    with watchdog.during("what follows the last step", math.inf):
        finish(config, model, processor, mesh, directory)


def _claim(directory: RunDirectory, config: TrainConfig) -> None:
    """Check that the run directory can be used and fill in what must be there."""
    check_writable(directory.path, 0)
    source_of(config.init, directory.model)
    check_shared(directory.path, "output_dir", config.hosts)
    if hosts.is_first():
        try:
            directory.claim(config)
            prepare(config.init, directory.model)
        except OSError as error:
            raise StoreError(f"cannot write to {directory.path}: {error.strerror or error}") from error
    hosts.barrier("run directory", config.hosts)


def _train(
    config: TrainConfig,
    session: Session,
    directory: RunDirectory,
    store: Store,
    processor: Processor,
    watchdog: Watchdog,
    stop: StopRequest,
) -> TrainState:
    with watchdog.during("the data sources to open", Watchdog.LONG):
        pipeline = Pipeline(config.data, processor)
    with watchdog.during("the weights to be read", Watchdog.LONG):
        state = _first_or_saved_state(config, session, directory, store, pipeline)
    start = int(state.step)
    first = hosts.is_first()
    with (
        _writers(config, directory, start) as writers,
        ProgressReport(config.steps, start, enabled=first) as progress,
    ):
        if start:
            progress.say(f"continuing after step {start} of {config.steps}")
        schedule = Schedule(config.steps, config.log_every, config.save_every)
        loop = Loop(session, schedule, store, directory.bad_step, writers, progress, watchdog, stop)
        return loop.run(state, pipeline, config.data.rows, lambda step: _describe(config, step))


def _first_or_saved_state(
    config: TrainConfig, session: Session, directory: RunDirectory, store: Store, pipeline: Pipeline
) -> TrainState:
    latest = store.latest
    if latest is not None:
        parameters, optimizer, data = store.restore(latest, parameters_of(session.state), session.state.optimizer)
        pipeline.restore(data)
        return state_of(parameters, optimizer, session.state)
    source = source_of(config.init, directory.model)
    model = import_hf(source, config.model, session.mesh, jax.random.key(config.seed))
    return session.first_state(session.graph.split(model))


@contextlib.contextmanager
def _writers(config: TrainConfig, directory: RunDirectory, after_step: int) -> Generator[list[MetricsWriter]]:
    writers: list[MetricsWriter] = []
    if hosts.is_first():
        writers.append(JsonlWriter(directory.metrics, after_step))
        if config.tensorboard:
            writers.append(TensorBoardWriter(directory.tensorboard, after_step))
    try:
        yield writers
    finally:
        for writer in writers:
            writer.close()


def _describe(config: TrainConfig, step: int) -> str:
    names = ", ".join(type(source).__name__ for source in config.data.sources)
    rows = f"rows 0 to {config.data.rows - 1} of batch {step} (counted from 0)"
    return f"{rows} under data seed {config.data.seed}, from {names}"


def finish(config: TrainConfig, model: Vlm, processor: Processor, mesh: Mesh, directory: RunDirectory) -> None:
    """What is done after the last step."""
    console = Console()
    for stage in config.final:
        match stage:
            case Eval():
                summary = evaluate(stage, model, processor, mesh, directory.evaluation(stage.name))
                if hosts.is_first():
                    print_summary(summary, console)
            case Report():
                if hosts.is_first():
                    console.print(f"report: {write_report(stage, directory.path)}", soft_wrap=True)
        hosts.barrier(f"final {type(stage).__name__}", config.hosts)


def load_run(path: str | Path, mesh: MeshConfig | None = None, step: int | None = None) -> LoadedRun:
    """The model of a run, from its checkpoints. Call `hosts.start` first.

    Args:
        path: the run directory.
        mesh: how to lay out this job's devices; default, all of them over fsdp. It need not be the run's.
        step: which checkpoint; default, the newest.

    Raises:
        ConfigError: not a run directory, or a run without a checkpoint.
        StoreError: the checkpoint cannot be read.
    """
    directory = run_directory(path)
    config = directory.read_config()
    devices = make_mesh(mesh or MeshConfig())
    if not directory.checkpoints.is_dir():
        raise ConfigError(f"{directory.path} holds no checkpoint yet")
    graph = ModelGraph(abstract_model(model_config(config.init, directory.model), config.model))
    with Store(directory.checkpoints, config.keep, reader=True) as store:
        step = store.latest if step is None else step
        if step is None:
            raise ConfigError(f"{directory.path} holds no checkpoint yet")
        found = store.restore_parameters(step, parameters_target(graph, devices))
    model = graph.merge(found["values"])
    processor = config.data.processor(directory.model, config.model.layout)
    return LoadedRun(config, model, processor, devices, step)
