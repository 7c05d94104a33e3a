"""The loop: feeds the step, reads its metrics one step late, saves, and stops when it must."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from rave_jax.checkpoint.store import PARAMETERS, Store, StoreError
from rave_jax.config import ConfigError
from rave_jax.data.ahead import AHEAD, Ahead
from rave_jax.data.packing.report import PackingMeter
from rave_jax.data.sample import SampleError
from rave_jax.observe.goodput import Goodput
from rave_jax.observe.metrics import MetricsWriter
from rave_jax.observe.progress import ProgressReport
from rave_jax.observe.waiting import WaitMeter
from rave_jax.parallel import agree, hosts, notes
from rave_jax.parallel.sharding import use_mesh
from rave_jax.parallel.stopping import StopRequest
from rave_jax.parallel.watchdog import Watchdog
from rave_jax.training.feed import Fed, Feed, RowSource
from rave_jax.training.meter import Meter
from rave_jax.training.profiling import Profiler
from rave_jax.training.session import Session
from rave_jax.training.state import TrainState, parameters_of
from rave_jax.training.step import StepMetrics

SLOW_DATA = "is the disk or network under it alive? if the data is just slow, raise hosts.step_timeout"
SLOW_STEP = "has another process stopped, or a device? if steps are only slow, raise hosts.step_timeout"
SLOW_SAVE = "does the disk under output_dir still take files? if it is only slow, raise hosts.step_timeout"
SLOW_EVALUATION = "has another process stopped, or a device? if programs are only slow, raise hosts.step_timeout"


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number. The message names the step, the data and the saved state."""


class Schedule(NamedTuple):
    """When the loop does what, in steps."""

    steps: int
    log_every: int
    save_every: int


class EvaluationEnded(Exception):
    """An evaluation was ended because the job is to end."""


class StepEvaluations(Protocol):
    """What the loop needs of the evaluations between steps (`training/evaluations.py`)."""

    def due(self, step: int) -> bool:
        """Is there one when so many steps are done?"""
        ...

    def run(
        self,
        step: int,
        model: Any,
        check: Callable[[], None],
        say: Callable[[str], None],
        write: Callable[[dict[str, float]], None],
    ) -> None:
        """Run them with a model, or take their results where they are there; `check` may end it."""
        ...


class Loop:
    """One run of the loop, from the state's step to the last."""

    def __init__(
        self,
        session: Session,
        schedule: Schedule,
        store: Store,
        bad_directory: Path,
        writers: Sequence[MetricsWriter],
        progress: ProgressReport,
        watchdog: Watchdog,
        stop: StopRequest,
        evaluations: StepEvaluations | None = None,
        packing: PackingMeter | None = None,
        metric: str | None = None,
        meter: Meter | None = None,
        profiler: Profiler | None = None,
    ):
        """
        Args:
            session: what runs.
            schedule: when to log and save.
            store: where checkpoints go.
            bad_directory: where the state before a bad step goes.
            writers: where metrics go; empty on all but one process.
            progress: what the terminal shows.
            watchdog: told what is waited for.
            stop: whether the job is to end.
            evaluations: what is evaluated between steps.
            packing: counts how well rows are packed, where they are.
            metric: name of the one by which the best checkpoints are kept.
            meter: measures the run's speed.
            profiler: told of each step.
        """
        self._packing = packing
        self._session, self._schedule, self._store, self._bad_directory = session, schedule, store, bad_directory
        self._writers, self._progress, self._watchdog, self._stop = writers, progress, watchdog, stop
        self._evaluations = evaluations
        self._metric = metric
        self._measured: tuple[int, dict[str, Any]] = (-1, {})
        self._wait = WaitMeter()
        self._meter = Meter(Goodput()) if meter is None else meter
        self._profiler = profiler
        self._saved = -1

    def run(
        self,
        state: TrainState,
        source: RowSource,
        rows: int,
        describe: Callable[[int], str],
        ahead: Ahead = AHEAD,
    ) -> TrainState:
        """Train to the last step.

        Args:
            state: is donated.
            source: the data.
            rows: of the global batch.
            describe: the data position of a step, for messages.
            ahead: how far loading runs ahead.

        Raises:
            NonFiniteError: loss or gradient is not finite; the state before that step is in `bad_directory`.
            Interrupted: the job was asked to end; the state of the last finished step is saved.
            StoreError: a checkpoint, metrics or an evaluation could not be written.
            ConfigError, SampleError: an evaluation cannot be run. A job of one process has saved the state.
            HostsError: the processes stopped with different states, which are not saved.
        """
        start = done = int(state.step)
        self._meter.goodput.training_begins()
        late: tuple[int, StepMetrics] | None = None
        fed: Fed | None = None
        compiled: set[tuple[int, ...]] = set()
        batches = Feed(source, self._session.mesh, rows, start, self._schedule.steps, ahead)
        with use_mesh(self._session.mesh), self._stop.training(), batches as feed:
            self._evaluate(start, state)  # what the run that is continued had not done
            for step in range(start, self._schedule.steps):
                begun = time.monotonic()
                with self._watchdog.during(f"the data of step {step + 1}: {describe(step)}", 1, SLOW_DATA, save=True):
                    following = feed.next(step, self._stop)
                if following is None or not self._stop.may_begin(step):
                    break
                fed, done = following, step + 1
                self._meter.waited(fed.waited)
                if fed.void:
                    notes.leave(f"stop/void/{step}", str(step))
                sizes = (*fed.batch.tokens.shape, *fed.batch.patches.pixels.shape)
                if compiles := sizes not in compiled:
                    compiled.add(sizes)
                what, times = (
                    (f"step {done}, which is compiled", Watchdog.LONG) if compiles else (f"step {done}", Watchdog.STEP)
                )
                if self._profiler is not None:
                    self._profiler.before(done)
                compiling = time.monotonic()
                with self._watchdog.during(what, times, SLOW_STEP):
                    state, metrics = self._session.step(state, fed.batch)
                # Reading the metrics of the step before keeps the devices busy and at most two steps in flight.
                if late is not None:
                    self._finish(*late, state, source, describe)
                late = (step, metrics)
                if compiles:
                    with self._watchdog.during(what, times, SLOW_STEP):
                        jax.block_until_ready(metrics)
                    self._meter.goodput.add("compile", time.monotonic() - compiling)
                    self._progress.restart_clock(done)
                    self._finish(*late, state, source, describe)
                    late = None
                elif warning := self._wait.add(fed.waited, time.monotonic() - begun):
                    self._progress.say(warning)
                self._store.check()
                saves = done % self._schedule.save_every == 0
                if saves or self._is_evaluated(done):
                    if late is not None:
                        self._finish(*late, state, source, describe)
                        late = None
                    if self._refused() is None:
                        self._evaluate(done, state, fed.data)
                        if saves:
                            self._save(done, state, fed.data)
            if fed is not None:
                if late is not None:
                    self._finish(*late, state, source, describe)
                if self._refused() is not None:
                    done = self._agreed_step(state)
                    self._save(done, state, source.state(done))
                else:
                    self._save(done, state, fed.data)
            saving = self._watchdog.during(f"the checkpoint of step {done}", Watchdog.LONG, SLOW_SAVE)
            with saving, self._meter.goodput.spent("save"):
                self._store.wait()
            if self._stop.asked is not None:
                raise self._stop.interrupted(self._where(done))
        return state

    def _where(self, done: int) -> str:
        if not done:
            return "stopped before the first step; the same command starts again"
        last = done == self._schedule.steps
        return f"stopped after step {done}{', the last' if last else ''}, which is saved; the same command continues"

    def _save(self, done: int, state: TrainState, data: dict[str, Any]) -> None:
        if done == self._saved:
            return
        self._saved = done
        saving = self._watchdog.during(f"the checkpoint of step {done}", Watchdog.LONG, SLOW_SAVE)
        with saving, self._meter.goodput.spent("save"):
            self._store.save(done, parameters_of(state), state.optimizer, data, self._metric_at(done))

    def _metric_at(self, done: int) -> float | None:
        """The metric by which the best checkpoints are kept, where it was measured at this step."""
        if self._metric is None:
            return None
        step, values = self._measured
        return agree.from_first(values.get(self._metric) if step == done else None)

    def _measure(self, done: int, values: dict[str, Any]) -> None:
        step, known = self._measured
        self._measured = done, (known if step == done else {}) | values

    def _is_evaluated(self, done: int) -> bool:
        return self._evaluations is not None and self._evaluations.due(done)

    def _evaluate(self, done: int, state: TrainState, data: dict[str, Any] | None = None) -> None:
        """Run the evaluations that are due. A stop request ends them, and the run that continues runs them again.

        Args:
            data: state of the source, to save where an evaluation cannot be run; None of a state that is saved.
        """
        if self._evaluations is None or not self._evaluations.due(done):
            return
        began = time.monotonic()
        say = self._progress.say

        def write(values: dict[str, float]) -> None:
            self._measure(done, values)
            self._write(done, values)

        try:
            with self._watchdog.during(f"the evaluation after step {done}", Watchdog.LONG, SLOW_EVALUATION):
                self._go_on()
                model = self._session.model(state)
                self._evaluations.run(done, model, self._go_on, say, write)
        except EvaluationEnded:
            say(f"the evaluation after step {done} was ended; the same command runs it")
        except (ConfigError, SampleError):
            # Other processes may wait in the evaluation, and would not come to save.
            if data is not None and hosts.place().processes == 1:
                self._save(done, state, data)
                self._store.wait()
                say(f"the evaluation after step {done} failed, and the state is saved; the same command runs it again")
            raise
        self._meter.evaluated(time.monotonic() - began)

    def _go_on(self) -> None:
        """Called between two pieces of an evaluation, by all processes alike.

        Raises:
            EvaluationEnded: the job is to end, as the first process knows it.
        """
        self._watchdog.again()
        if agree.from_first(self._stop.asked is not None):
            raise EvaluationEnded

    def _refused(self) -> int | None:
        """The first step that was refused because a process stood in for data that did not come, or None."""
        found = notes.read("stop/void").values() if self._stop.asked is not None else ()
        return min(map(int, found), default=None)

    def _agreed_step(self, state: TrainState) -> int:
        """The step of the state before the steps that were refused.

        Raises:
            HostsError: the processes differ: one updated its part of the state where another refused to.
        """
        step = int(state.step)
        here, count = hosts.place()
        notes.leave(f"stop/state/{here}", str(step))
        with self._watchdog.during("the other processes to say after which step they stopped", 2):
            found = notes.gather("stop/state", count, self._stop.timeout)
        if len(set(found.values())) > 1:
            states = ", ".join(f"{found[str(process)]} (process {process})" for process in range(count))
            raise hosts.HostsError(
                f"{self._stop.asked}: data came too late on one process, and the processes hold states of different "
                f"steps, {states}, which are not saved; the same command continues after the newest checkpoint"
            )
        return step

    def _finish(
        self, step: int, metrics: StepMetrics, state: TrainState, source: RowSource, describe: Callable[[int], str]
    ) -> None:
        """Wait for a step, then check, show and write its metrics."""
        done = step + 1
        with self._watchdog.during(f"step {done}", Watchdog.STEP, SLOW_STEP):
            values = named_values(metrics)
        bad = values.pop("bad_step")
        if bad >= 0 and (refused := self._refused()) is not None and bad >= refused:
            return
        self._stop.finished()
        if bad >= 0:
            self._stop_bad(bad, values, state, source, describe)
        self._measure(done, values)
        images = values.pop("images")
        self._meter.finished(values["tokens"], images)
        if self._packing is not None:
            self._packing.add(step, values["tokens"])
        logged = done == 1 or done % self._schedule.log_every == 0 or done == self._schedule.steps
        if logged:
            values |= self._meter.take()
            if self._packing is not None:
                values |= self._packing.take()
            self._write(done, values)
        self._progress.update(done, values, line=logged)

    def _write(self, done: int, values: dict[str, Any]) -> None:
        try:
            for writer in self._writers:
                writer.write(done, values)
        except OSError as error:
            where = error.filename or "the run directory"
            why = error.strerror or error
            what = f"the metrics of step {done} could not be written to {where}: {why}"
            with contextlib.suppress(StoreError):  # the save under way may still have room
                self._store.wait()
            raise StoreError(f"{what}; {self._store.last_saved()}") from error

    def _stop_bad(
        self, step: int, values: dict[str, Any], state: TrainState, source: RowSource, describe: Callable[[int], str]
    ) -> None:
        # The step refused its own update and every later one, so `state` is the one before it.
        with self._watchdog.paused(), Store(self._bad_directory, keep=1) as store:
            store.save(step, parameters_of(state), state.optimizer, source.state(step))
        raise NonFiniteError(
            f"step {step + 1}: loss is {values['loss']}, gradient norm is {values['grad_norm']}; "
            f"data: {describe(step)}; the state before this step is in {self._bad_directory / str(step) / PARAMETERS}"
        )


def named_values(metrics: StepMetrics) -> dict[str, Any]:
    """Metrics as plain numbers by the names they are logged under: a mechanism's loss is `loss/NAME`, the
    gradient's norm of a group `grad_norm/NAME`, the size of a mechanism's parameter `mechanism/NAME`, a figure of what
    a mechanism chooses `routing/MECHANISM/FIGURE`."""
    found = jax.device_get(metrics)._asdict()
    found |= {f"loss/{name}": value for name, value in found.pop("losses").items()}
    found |= {f"mechanism/{name}": value for name, value in found.pop("mechanisms").items()}
    found |= {f"routing/{name}": value for name, value in found.pop("routing").items()}
    by_group = found.pop("group_norms")
    if len(by_group) > 1:
        found |= {f"grad_norm/{name}": value for name, value in by_group.items()}
    return {name: value.item() for name, value in found.items()}
