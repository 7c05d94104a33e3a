"""A whole run: directory, weights, training, what comes after it; and reading a run's model back."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from rave_jax import config as configs
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.store import Store, StoreError, check_room, local_bytes
from rave_jax.checkpoint.target import abstract_model
from rave_jax.checkpoint.tiny import Tiny
from rave_jax.config import ConfigError
from rave_jax.data.ahead import Ahead
from rave_jax.data.config import check_takes
from rave_jax.data.packing.plan import PackedRows
from rave_jax.data.packing.report import PackingMeter
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Source
from rave_jax.evaluation.config import Eval, Report
from rave_jax.evaluation.report import write_report
from rave_jax.evaluation.suites import evaluate, open_checked
from rave_jax.evaluation.summary import print_summary
from rave_jax.families.config import VlmConfig
from rave_jax.models.vlm import Vlm
from rave_jax.observe.goodput import Goodput
from rave_jax.observe.metrics import JsonlWriter, MetricsWriter, TensorBoardWriter, read_jsonl
from rave_jax.observe.progress import CountBar, ProgressReport
from rave_jax.observe.tables import print_parameters
from rave_jax.observe.wandb import MissingPackage, WandbWriter
from rave_jax.parallel import agree, hosts
from rave_jax.parallel.memory import check_memory
from rave_jax.parallel.mesh import MeshConfig, make_mesh, mesh_line
from rave_jax.parallel.sharding import use_mesh
from rave_jax.parallel.stopping import StopRequest
from rave_jax.parallel.watchdog import Watchdog
from rave_jax.training.averages import Weights
from rave_jax.training.claim import Claim, claimed
from rave_jax.training.config import TrainConfig, check_can_be_read_again
from rave_jax.training.directory import RunDirectory, opened, run_directory
from rave_jax.training.evaluations import Evaluations, part_named
from rave_jax.training.footprint import least_activations, least_spread
from rave_jax.training.init import model_config, source_of
from rave_jax.training.loop import Loop, Schedule
from rave_jax.training.meter import Meter, Work
from rave_jax.training.profiling import Profiler, early_signals_ignored, on_signal
from rave_jax.training.session import Session, group_rows, session_of
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


WorkOf = Callable[[TrainConfig, VlmConfig, Session], Work | None]
"""Finds what a step asks of the devices of a run."""


def train(config: TrainConfig, stop: StopRequest | None = None, work_of: WorkOf | None = None) -> None:
    """Run or continue an experiment. Call `hosts.start` first.

    Args:
        config: what to run.
        stop: says whether the job is to end; None: it runs to its last step.
        work_of: what MFU is reckoned with; None: no MFU is in the metrics.

    Raises:
        ConfigError: the config does not fit the machine, the checkpoint, the data or the run directory.
        StoreError: the run directory cannot be written.
        NonFiniteError: a loss or gradient was not finite.
        Interrupted: the job was asked to end; the state of the last finished step is saved.
    """
    stop = StopRequest() if stop is None else stop
    check_can_be_read_again(config)
    goodput = Goodput()
    with (
        early_signals_ignored(),
        Watchdog(config.hosts.step_timeout, stop) as watchdog,
        opened(config.output_dir) as directory,
    ):
        _run(config, directory, watchdog, stop, goodput, work_of)


def _run(
    config: TrainConfig,
    directory: RunDirectory,
    watchdog: Watchdog,
    stop: StopRequest,
    goodput: Goodput,
    work_of: WorkOf | None,
) -> None:
    mesh = make_mesh(config.mesh)
    agree.check_same_config(config, "hosts", "output_dir")  # whether that is one place is asked of the place itself
    with watchdog.during("the data sources to open", Watchdog.LONG):
        sources = config.data.open_sources()
    with use_mesh(mesh), claimed(directory, config) as claim:
        vlm = model_config(config.init, claim.model)
        with watchdog.during("the data of evaluations to open", Watchdog.LONG):
            sampled = _check_final(config, vlm)
        model = abstract_model(vlm, config.model)
        session = session_of(config, model, mesh)
        check_memory(session.state, "parameters and optimizer state")
        check_memory(least_activations(config, vlm, mesh), "the rows of a batch (data.rows, tokens, patches)")
        kept = config.retention.most(config.steps, config.save_every)
        check_room(directory.checkpoints, kept * local_bytes(session.state) - _present(directory, claim.steps))
        processor = config.data.processor(claim.model, config.model.layout)
        pipeline = Pipeline(config.data, processor, sources, keeps=hosts.is_first())
        evaluations = Evaluations(config, sampled, model, processor, mesh, directory)
        for number, shapes in evaluations.shapes().items():
            held = (session.state, least_spread(shapes, mesh))
            check_memory(held, f"parameters, optimizer state and the slots of final.{number} (rows, tokens, patches)")
        if not claim.steps:
            first = watchdog.during("the first sample", Watchdog.LONG)
            with first, CountBar("measuring samples", enabled=hosts.is_first()) as bar:
                pipeline.tell(bar)
                pipeline.check_samples()  # budgets that no sample fits are known before anything is written
                pipeline.tell(None)
        if hosts.is_first():
            log.info(mesh_line(config.mesh))
            print_parameters(group_rows(session, config.optimizer))
        with watchdog.during("the weights to be read", Watchdog.LONG):
            state = _first_or_saved_state(config, session, directory, claim, pipeline)
        meter = Meter(goodput, None if work_of is None else work_of(config, vlm, session))
        # A run that is killed goes on from its newest state, and must find the metrics that led to it.
        pushes = directory.push if hosts.is_first() and directory.mirror is not None else None
        with Store(directory.checkpoints, config.retention, before=pushes) as store:
            if claim.past is not None:
                evaluations.continue_after(claim.after_step)
            state = _train(
                config, session, directory, claim, store, state, pipeline, watchdog, stop, evaluations, meter
            )
        model = session.model(state)
        del state  # the optimizer's part of it is not needed any more
        with watchdog.during("what follows the last step", math.inf):
            try:
                finish(config, model, processor, mesh, directory, evaluations)
            except OSError as error:
                raise StoreError(f"training is done and saved, but the evaluation or report failed: {error}") from error


def _present(directory: RunDirectory, steps: list[int]) -> int:
    """Bytes of the checkpoints that are there; those in a bucket take no room of ours."""
    if directory.mirror is not None:
        return 0
    return sum(f.stat().st_size for s in steps for f in directory.checkpoint(s).rglob("*") if f.is_file())


def _check_final(config: TrainConfig, model: VlmConfig) -> dict[int, Source]:
    """What follows the last step is known to be possible before the first; the samples of evaluations by place."""
    sources = {}
    for number, part in enumerate(config.final):
        if isinstance(part, Eval):
            with part_named(number):
                sources[number] = open_checked(part, model.text)
                check_takes(model, sources[number], "data")
    return sources


def _first_or_saved_state(
    config: TrainConfig, session: Session, directory: RunDirectory, claim: Claim, pipeline: Pipeline
) -> TrainState:
    """The state to go on from. The run directory is written as soon as nothing but training can fail.

    `import_hf` and not `tools.source.load`, which also reads runs: an `init` is never a run, and parameters that the
    source lacks start from the run's seed.
    """
    if claim.steps:
        with Store(directory.checkpoints, config.retention) as store:
            found = store.restore_newest(parameters_of(session.state), session.state.optimizer)
        if found is not None:
            pipeline.restore(found.data)
            claim.write(found.step)
            return state_of(found.parameters, found.optimizer, session.state)
    written = isinstance(config.init, Tiny)
    if written:
        claim.write(0)  # with the weights
    source = source_of(config.init, directory.model)
    model = import_hf(source, config.model, session.mesh, jax.random.key(config.seed))
    if not written:
        claim.write(0)
    return session.first_state(session.graph.split(model))


def _train(
    config: TrainConfig,
    session: Session,
    directory: RunDirectory,
    claim: Claim,
    store: Store,
    state: TrainState,
    pipeline: Pipeline,
    watchdog: Watchdog,
    stop: StopRequest,
    evaluations: Evaluations,
    meter: Meter,
) -> TrainState:
    start = claim.after_step
    first = hosts.is_first()
    again = _steps_after(directory, start) if first else 0
    with (
        _writers(config, directory, start) as writers,
        ProgressReport(config.steps, start, enabled=first) as progress,
        contextlib.closing(pipeline.skip_log),
        contextlib.closing(pipeline),
    ):
        if claim.past is not None and config.steps > claim.past.steps:
            progress.say(_extended(config, claim.past.steps, start))
        elif start:
            lost = f"; {again} that were done after it are done again" if again else ""
            progress.say(f"continuing after step {start} of {config.steps}{lost}")
        schedule = Schedule(config.steps, config.log_every, config.save_every)
        packing = PackingMeter(pipeline.plan) if isinstance(pipeline.plan, PackedRows) else None
        profiler = Profiler(config.profile, directory.profile, lambda text: progress.say(directory.shown(Path(text))))
        metric = None if config.keep_best is None else config.keep_best.metric
        loop = Loop(
            session,
            schedule,
            store,
            directory.bad_step,
            writers,
            progress,
            watchdog,
            stop,
            evaluations,
            packing,
            metric,
            meter,
            profiler,
        )
        ahead = Ahead(config.data.prefetch, config.data.workers, config.data.processes)
        with on_signal(profiler):
            state = loop.run(state, pipeline, config.data.rows, lambda step: _describe(config, step), ahead)
        progress.say(meter.goodput.line())
        if packing is not None and (summary := packing.summary()):
            progress.say(summary)
        return state


def _steps_after(directory: RunDirectory, start: int) -> int:
    """Steps that were done after the one that the run continues from, as far as its metrics tell."""
    try:
        rows = read_jsonl(directory.metrics)
    except OSError:  # the writer that opens it says so
        return 0
    return max(0, max((int(row["step"]) for row in rows), default=0) - start)


def _extended(config: TrainConfig, before: int, start: int) -> str:
    said = f"continuing after step {start}, with {config.steps} steps where there were {before}"
    if config.optimizer.decay == "none":
        return said
    return (
        f"{said}: the learning rate continues on the {config.optimizer.decay} decay of {config.steps} steps, so the "
        f"numbers are not those of a run that had {config.steps} from its start (config.json keeps both)"
    )


@contextlib.contextmanager
def _writers(config: TrainConfig, directory: RunDirectory, after_step: int) -> Generator[list[MetricsWriter]]:
    writers: list[MetricsWriter] = []
    if hosts.is_first():
        try:
            writers.append(JsonlWriter(directory.metrics, after_step))
            if config.tensorboard:
                writers.append(TensorBoardWriter(directory.tensorboard, after_step))
            if config.wandb is not None:
                settings = configs.to_json(config)
                writers.append(WandbWriter(config.wandb, directory.path, settings, after_step))
        except MissingPackage as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise StoreError(f"cannot write to {error.filename or directory}: {error.strerror or error}") from error
    try:
        yield writers
    except BaseException:
        for writer in writers:
            with contextlib.suppress(OSError):  # what is being raised says more
                writer.close()
        raise
    try:
        for writer in writers:
            writer.close()
    except OSError as error:
        raise StoreError(f"the last metrics could not be written to {directory}: {error.strerror or error}") from error


def _describe(config: TrainConfig, step: int) -> str:
    names = ", ".join(type(source).__name__ for source in config.data.sources)
    rows = f"rows 0 to {config.data.rows - 1} of batch {step} (counted from 0)"
    return f"{rows} under data seed {config.data.seed}, from {names}"


def finish(
    config: TrainConfig,
    model: Vlm,
    processor: Processor,
    mesh: Mesh,
    directory: RunDirectory,
    evaluations: Evaluations,
) -> None:
    """What is done after the last step."""
    console = Console()
    for number, part in enumerate(config.final):
        match part:
            case Eval():
                out = directory.evaluation(part.name)
                if evaluations.handles(number):
                    summary = evaluations.last(number)
                else:
                    summary = evaluate(part, model, processor, mesh, out)
                if hosts.is_first() and summary is not None:
                    print_summary(summary, console)
                elif hosts.is_first():
                    before = directory.shown(out / "summary.json")
                    console.print(f"evaluation {part.name} was run before: {before}", soft_wrap=True)
            case Report():
                if hosts.is_first():
                    report = directory.shown(write_report(part, directory.path))
                    console.print(f"report: {report}", soft_wrap=True)
        hosts.barrier(f"final {type(part).__name__}", config.hosts)


def load_run(
    path: str | Path,
    mesh: MeshConfig | Mesh | None = None,
    step: int | None = None,
    *,
    weights: Weights = "trained",
    as_stored: bool = False,
) -> LoadedRun:
    """The model of a run, from its checkpoints. Call `hosts.start` first.

    Args:
        path: the run directory.
        mesh: this job's devices, or how to lay them out; default, all of them over fsdp. It need not be the run's.
        step: which checkpoint; default, the newest that is sound.
        weights: of the last step, or their average.
        as_stored: keep the number types of the checkpoint, which are those of master copies and of the average.

    Raises:
        ConfigError: not a run directory, a run without a checkpoint, or one without an average that is asked for.
        StoreError: the checkpoint cannot be read.
    """
    directory = run_directory(path)
    config = directory.read_config()
    if weights == "ema" and config.optimizer.ema is None:
        raise ConfigError(f"weights is 'ema', but {directory.path} has no average (optimizer.ema is None); 'trained'?")
    devices = mesh if isinstance(mesh, Mesh) else make_mesh(mesh or MeshConfig())
    if not directory.checkpoints.is_dir():
        raise ConfigError(f"{directory} holds no checkpoint yet")
    graph = ModelGraph(abstract_model(model_config(config.init, directory.model), config.model))
    with Store(directory.checkpoints, config.keep, reader=True) as store:
        target = parameters_target(graph, devices, config.optimizer)
        if step is not None:
            parameters = store.restore_parameters(step, target)
        elif (found := store.restore_newest(target)) is not None:
            step, parameters = found.step, found.parameters
        else:
            raise ConfigError(f"{directory} holds no checkpoint yet")
    values = parameters["values"] | (parameters["ema"] if weights == "ema" else {})
    model = graph.merge(values if as_stored else graph.computed(values))
    processor = config.data.processor(directory.model, config.model.layout)
    return LoadedRun(config, model, processor, devices, step)
