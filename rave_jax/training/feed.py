"""Batches ahead of the step that needs them: a thread loads rows and puts them on devices."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from jax.sharding import Mesh

from rave_jax.batch import Batch
from rave_jax.parallel.rows import global_batch, owned_rows


class RowSource(Protocol):
    """What the feed needs of a data pipeline."""

    def stream(self, step: int, start: int, stop: int) -> Iterator[Batch]:
        """Rows start..stop-1 of the global batch of `step` and all steps after it, as numpy."""
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
    """

    batch: Batch
    data: dict[str, Any]
    waited: float


class Feed:
    """The batches of steps `start` to `stop`, in order. Use as a context manager."""

    def __init__(self, source: RowSource, mesh: Mesh, rows: int, start: int, stop: int, depth: int = 2):
        """
        Args:
            source: loads rows.
            mesh: where batches go.
            rows: rows of the global batch.
            start: first step.
            stop: the step after the last.
            depth: batches that may wait.
        """
        self._source, self._mesh, self._rows, self._steps = source, mesh, rows, range(start, stop)
        self._queue: queue.Queue[Fed | Exception] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="data feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def next(self) -> Fed:
        """The batch of the next step.

        Raises:
            Exception: whatever the source raised.
        """
        asked = time.monotonic()
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item._replace(waited=time.monotonic() - asked)

    def _fill(self) -> None:
        spans = owned_rows(self._mesh, self._rows)
        streams = {span: self._source.stream(self._steps.start, span.start, span.stop) for span in spans}
        for step in self._steps:
            item: Fed | Exception
            try:
                batch = global_batch(lambda span: next(streams[span]), self._mesh, self._rows)
                item = Fed(batch, self._source.state(step + 1), 0.0)
            except Exception as error:
                item = error
            if not self._offer(item) or isinstance(item, Exception):
                return

    def _offer(self, item: Fed | Exception) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
