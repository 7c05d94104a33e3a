"""The loop: feeds the step, reads its metrics one step late, saves, and stops when it must."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from rave_jax.checkpoint.store import PARAMETERS, Store, StoreError
from rave_jax.observe.metrics import MetricsWriter
from rave_jax.observe.progress import ProgressReport
from rave_jax.observe.waiting import WaitMeter
from rave_jax.parallel.hosts import Watchdog
from rave_jax.parallel.sharding import use_mesh
from rave_jax.training.feed import Feed, RowSource
from rave_jax.training.session import Session
from rave_jax.training.state import TrainState, parameters_of
from rave_jax.training.step import StepMetrics


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number. The message names the step, the data and the saved state."""


class Interrupted(RuntimeError):
    """The process was asked to end; the state of the last finished step is saved."""


class Schedule(NamedTuple):
    """When the loop does what, in steps."""

    steps: int
    log_every: int
    save_every: int


class StopRequest:
    """Notes SIGTERM and SIGINT, once each; the second time they act as usual. Use as a context manager."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere (tests) nothing is noted.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, self._before[number])

    def reached(self, step: int) -> str | None:
        """The signal's name if the job is to stop after this step; the same answer on every process."""
        if jax.process_count() == 1:
            return self.signal
        # The distributed runtime hears SIGTERM for all processes and agrees on a step.
        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None


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
    ):
        """
        Args:
            session: what runs.
            schedule: when to log and save.
            store: where checkpoints go.
            bad_directory: where the state before a bad step goes.
            writers: where metrics go; empty on all but one process.
            progress: what the terminal shows.
            watchdog: told of every finished step.
        """
        self._session, self._schedule, self._store, self._bad_directory = session, schedule, store, bad_directory
        self._writers, self._progress, self._watchdog = writers, progress, watchdog
        self._wait = WaitMeter()
        self._tokens, self._clock = 0, time.monotonic()

    def run(self, state: TrainState, source: RowSource, rows: int, describe: Callable[[int], str]) -> TrainState:
        """Train to the last step.

        Args:
            state: is donated.
            source: the data.
            rows: of the global batch.
            describe: the data position of a step, for messages.

        Raises:
            NonFiniteError: loss or gradient is not finite; the state before that step is in `bad_directory`.
            Interrupted: SIGTERM or SIGINT came; the state is saved.
            StoreError: a checkpoint or metrics could not be written.
        """
        start = int(state.step)
        late: tuple[int, StepMetrics] | None = None
        compiled: set[tuple[int, ...]] = set()
        with use_mesh(self._session.mesh), StopRequest() as stop, self._feed(source, rows, start) as feed:
            for step in range(start, self._schedule.steps):
                done, begun = step + 1, time.monotonic()
                fed = feed.next()
                sizes = (*fed.batch.tokens.shape, *fed.batch.patches.shape)
                if compiles := sizes not in compiled:
                    compiled.add(sizes)
                    self._watchdog.expect_compilation()
                state, metrics = self._session.step(state, fed.batch)
                # Reading the metrics of the step before keeps the devices busy and at most two steps in flight.
                if late is not None:
                    self._finish(*late, state, fed.data, describe)
                late = (step, metrics)
                if compiles:
                    jax.block_until_ready(metrics)
                    self._progress.restart_clock(done)
                    self._finish(*late, state, fed.data, describe)
                    late = None
                elif warning := self._wait.add(fed.waited, time.monotonic() - begun):
                    self._progress.say(warning)
                self._store.check()
                asked = stop.reached(step)
                if asked or done % self._schedule.save_every == 0 or done == self._schedule.steps:
                    if late is not None:
                        self._finish(*late, state, fed.data, describe)
                        late = None
                    self._store.save(done, parameters_of(state), state.optimizer, fed.data)
                if asked:
                    self._store.wait()
                    raise Interrupted(f"{asked}: stopped after step {done}, which is saved; the same command continues")
        with self._watchdog.paused():
            self._store.wait()
        return state

    def _feed(self, source: RowSource, rows: int, start: int) -> Feed:
        return Feed(source, self._session.mesh, rows, start, self._schedule.steps)

    def _finish(
        self, step: int, metrics: StepMetrics, state: TrainState, data: dict[str, Any], describe: Callable[[int], str]
    ) -> None:
        """Wait for a step, then check, show and write its metrics."""
        values = named_values(metrics)
        bad = values.pop("bad_step")
        done = step + 1
        self._watchdog.beat(f"step {done}")
        if bad >= 0:
            self._stop_bad(bad, values, state, data, describe)
        self._tokens += values["tokens"]
        logged = done == 1 or done % self._schedule.log_every == 0 or done == self._schedule.steps
        if logged:
            now = time.monotonic()
            values["tokens_per_second"] = round(self._tokens / max(now - self._clock, 1e-9), 1)
            self._tokens, self._clock = 0, now
            self._write(done, values)
        self._progress.update(done, values, line=logged)

    def _write(self, done: int, values: dict[str, Any]) -> None:
        try:
            for writer in self._writers:
                writer.write(done, values)
        except OSError as error:
            where = error.filename or "the run directory"
            why = error.strerror or error
            raise StoreError(f"the metrics of step {done} could not be written to {where}: {why}") from error

    def _stop_bad(
        self, step: int, values: dict[str, Any], state: TrainState, data: dict[str, Any], describe: Callable[[int], str]
    ) -> None:
        # The step refused its own update and every later one, so `state` is the one before it.
        with self._watchdog.paused(), Store(self._bad_directory, keep=1) as store:
            store.save(step, parameters_of(state), state.optimizer, data)
        raise NonFiniteError(
            f"step {step + 1}: loss is {values['loss']}, gradient norm is {values['grad_norm']}; "
            f"data: {describe(step)}; the state before this step is in {self._bad_directory / str(step) / PARAMETERS}"
        )


def named_values(metrics: StepMetrics) -> dict[str, Any]:
    """Metrics as plain numbers by the names they are logged under: a mechanism's loss is `loss/NAME`."""
    found = jax.device_get(metrics)._asdict()
    found |= {f"loss/{name}": value for name, value in found.pop("losses").items()}
    return {name: value.item() for name, value in found.items()}
