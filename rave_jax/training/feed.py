"""Batches ahead of the step that needs them: rows come from grain (`data/ahead.py`), a thread puts them on the devices.

This is the only place where batches are made ahead.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from rave_jax.batch import Batch
from rave_jax.data.ahead import AHEAD, Ahead, rows_ahead
from rave_jax.data.pipeline import Rows
from rave_jax.parallel.rows import global_batch, owned_rows
from rave_jax.parallel.stopping import StopRequest

POLL, GRACE, LEAVE = 0.1, 10.0, 5.0
"""Seconds between two looks at the stop request, for late data once the job ends, and for the thread to end."""
ON_DEVICES = 2
"""Batches that wait on the devices."""


class RowSource(Protocol):
    """What the feed needs of a data pipeline."""

    def load(self, step: int, start: int, stop: int) -> Rows:
        """Rows start..stop-1 of the global batch of `step`, as numpy. Called from several threads, and in processes of
        its own, to which the source is sent, where `Ahead.processes` says so."""
        ...

    def count(self, rows: Rows) -> None:
        """Count the skips of rows that a step is given, in the order of the steps, before its `state` is asked for."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """JSON-ready state before `step` is taken."""
        ...


class Fed(NamedTuple):
    """One step's batch.

    Fields:
        batch: global arrays.
        data: state of the source before the step after it.
        waited: seconds that the step waited for it.
        void: a stand-in for data that did not come (`Feed.next`).
    """

    batch: Batch
    data: dict[str, Any]
    waited: float
    void: bool = False


class Feed:
    """The batches of steps `start` to `stop`, in order. Use as a context manager."""

    def __init__(self, source: RowSource, mesh: Mesh, rows: int, start: int, stop: int, ahead: Ahead = AHEAD):
        """
        Args:
            source: loads rows.
            mesh: where batches go.
            rows: rows of the global batch.
            start: first step.
            stop: the step after the last.
            ahead: how far loading runs ahead.

        Raises:
            ConfigError: the mesh does not divide the rows.
        """
        self._source, self._mesh, self._rows, self._steps = source, mesh, rows, range(start, stop)
        self._spans, self._ahead = owned_rows(mesh, rows), ahead
        self._queue: queue.Queue[Fed | BaseException] = queue.Queue(ON_DEVICES)
        self._last: Fed | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="data feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # A source that hangs is left behind: the thread ends with the process.
        self._thread.join(timeout=LEAVE)

    def next(self, step: int, stop: StopRequest) -> Fed | None:
        """The batch of a step.

        When the job is asked to end, a step that no process has begun needs no batch. One that another process has
        begun does, since its devices wait for ours: if the source gives nothing then either, the step gets the batch
        before it with a weight of infinity, and every process refuses an update whose loss is not a number.

        Args:
            step: the next one.
            stop: asked while the source gives nothing.

        Returns:
            None when the step is not to be run.

        Raises:
            BaseException: whatever the source raised.
        """
        asked = time.monotonic()
        grace = min(GRACE, stop.timeout / 4)
        overdue: float | None = None
        while True:
            try:
                item = self._queue.get(timeout=POLL)
            except queue.Empty:
                if not stop.is_wanted(step):
                    return None
                if stop.asked is None:
                    continue
                overdue = time.monotonic() + grace if overdue is None else overdue
                if self._last is None or time.monotonic() < overdue:
                    continue
                return Fed(_void(self._last.batch), self._source.state(step), time.monotonic() - asked, void=True)
            if isinstance(item, BaseException):
                # What ends a job may end a process that loads before it has learned to leave signals to this one.
                if isinstance(item, ChildProcessError) and stop.asked is not None and not stop.is_wanted(step):
                    return None
                raise item
            self._last = item._replace(waited=time.monotonic() - asked)
            return self._last

    def _fill(self) -> None:
        try:
            loaded = rows_ahead(self._source.load, self._steps, self._spans, self._ahead)
            with contextlib.closing(loaded):
                for step, parts in zip(self._steps, loaded, strict=True):
                    for part in parts:
                        self._source.count(part)
                    rows = dict(zip(self._spans, (part.batch for part in parts), strict=True))
                    batch = global_batch(rows.__getitem__, self._mesh, self._rows)
                    if not self._offer(Fed(batch, self._source.state(step + 1), 0.0)):
                        return
        except BaseException as error:  # libraries in Rust panic with one that is no Exception
            self._offer(error)

    def _offer(self, item: Fed | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _void(batch: Batch) -> Batch:
    """The batch with weights of infinity. Made without a computation, in which other processes would have to join."""
    weights = batch.loss_weights

    def fill(place: tuple[slice, ...] | None) -> np.ndarray:
        parts = place or (slice(None),) * weights.ndim
        shape = [len(range(*part.indices(size))) for part, size in zip(parts, weights.shape, strict=True)]
        return np.full(shape, np.inf, weights.dtype)

    return batch._replace(loss_weights=jax.make_array_from_callback(weights.shape, weights.sharding, fill))
