"""Rows of steps, loaded before they are asked for by grain's threads, or by processes of its own.

What is loaded is a function of the step, so grain's iterators are begun at the step that comes next, and their state is
saved nowhere. Whatever the number of threads and processes, the same rows come in the same order.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rave_jax.data.pipeline import Rows

Load = Callable[[int, int, int], Rows]
"""(step, start, stop) -> rows start..stop-1 of the batch of the step. Called from several threads; it can be pickled
where processes load."""


class Ahead(NamedTuple):
    """How far loading runs ahead, and in how many threads and processes.

    Fields:
        batches: loaded ahead; 0 loads one at a time, except in processes, which load one each.
        workers: threads for each range of rows that this process owns, or of each of `processes`.
        processes: that load rows; 0 loads them in threads of this process.
    """

    batches: int = 2
    workers: int = 1
    processes: int = 0


AHEAD = Ahead()
"""The default of a config."""


def rows_ahead(load: Load, steps: range, spans: Sequence[range], ahead: Ahead = AHEAD) -> Generator[list[Rows]]:
    """The rows of each step, one `Rows` for each span. Close it: its threads and processes end with it.

    Args:
        load: loads them.
        steps: consecutive.
        spans: ranges of rows of every step.
        ahead: how far loading runs ahead.

    Raises:
        BaseException: what `load` raised.
        ChildProcessError: a process could not start, or ended by itself.
    """
    import absl.flags
    import grain  # it imports jax, which not all users of this file do

    batches, workers, processes = ahead
    # Spans of a step are loaded apart from each other, so that threads share a step.
    each = len(spans)
    places = grain.MapDataset.range(len(steps) * each)
    loads = _Loads(load, steps.start, tuple((span.start, span.stop) for span in spans))
    if not steps:
        return
    if processes:
        processes = min(processes, len(places))
        threads = workers if workers > 1 else 0
        options = grain.multiprocessing.MultiprocessingOptions(processes, max(1, -(-batches * each // processes)))
        inside = places.map(_Caught(loads)).to_iter_dataset(grain.ReadOptions(threads, threads))
        if not absl.flags.FLAGS.is_parsed():  # grain reads flags of its own, which no command line of ours has
            absl.flags.FLAGS.mark_as_parsed()
        iterator = iter(inside.mp_prefetch(options, _begin))
    else:
        threads, waiting = (workers * each, max(batches, workers) * each) if batches else (0, 0)
        iterator = iter(places.map(loads).to_iter_dataset(grain.ReadOptions(threads, waiting)))
    try:
        for _ in steps:
            yield [_next(iterator, processes) for _ in spans]
    finally:
        iterator.close()
        if processes:
            del iterator
            gc.collect()  # cycles of grain's hold the last rows, and so shared memory that is to be given back


class _Loads(NamedTuple):
    """Number of a span, over all steps -> its rows."""

    load: Load
    first: int
    spans: tuple[tuple[int, int], ...]

    def __call__(self, number: int) -> Rows:
        step, span = divmod(number, len(self.spans))
        return self.load(self.first + step, *self.spans[span])


class _Failed:
    """What loading raised in a process, in place of rows. It is data, so that it is not taken for a broken process."""

    def __init__(self, error: BaseException):
        try:
            pickle.loads(pickle.dumps(error))
            sound = isinstance(error, Exception)  # the others would end this process, or a thread, without a word
        except Exception:
            sound = False
        self.error = error if sound else RuntimeError(f"{type(error).__name__}: {error}")


class _Caught(NamedTuple):
    """Rows, or what loading them raised. Libraries in Rust panic with an error that is no Exception."""

    loads: _Loads

    def __call__(self, number: int) -> Rows | _Failed:
        try:
            return self.loads(number)
        except BaseException as error:
            return _Failed(error)


def _next(iterator: Any, processes: int) -> Rows:
    if not processes:
        return next(iterator)
    try:
        rows = next(iterator)
    except Exception as error:
        raise ChildProcessError(_died(error, processes)) from error
    if isinstance(rows, _Failed):
        raise rows.error
    return _copied(rows)


def _copied(tree: Any) -> Any:
    """The arrays of a tree in memory of this process, so that shared memory is free for the next."""
    if isinstance(tree, np.ndarray):
        return np.array(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_make"):
        return tree._make(map(_copied, tree))
    return tree


def _died(error: Exception, processes: int) -> str:
    found = re.search(r"exit code (-?\d+)", str(error))
    code = int(found[1]) if found else 0
    why = {
        -signal.SIGKILL: "it was killed, perhaps because memory ran out: give data.processes, data.prefetch or "
        "data.cache_mb less",
        -signal.SIGBUS: "the shared memory of the machine (/dev/shm) is full: make it larger, or give data.processes "
        "or data.prefetch less",
    }.get(code, f"exit code {code}; what it wrote last says why" if found else f"{type(error).__name__}: {error}")
    return (
        f"a process that loads rows (data.processes {processes}) has ended: {why}. The same command continues after "
        "the newest checkpoint; with data.processes 0 threads load"
    )


def _begin(number: int, count: int) -> None:
    """What a process does first: the run's own process hears signals, and this one ends with it, however that ends."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
