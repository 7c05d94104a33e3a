"""Where the requests of a stream come from: a list, which is read directly, or an iterator, which is read on a thread.

A source may be slow: a pipe, a queue, a folder on a network. While its thread waits for the next request, or cuts the
pictures of one, answers go on to grow.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax

from rave_jax.parallel import agree

LOOK = 1.0
"""Seconds for which the first of several processes waits for a request before it tells the others that none came."""


class Intake[Given, Ready](Protocol):
    """Requests of a stream in their order, made ready to be answered."""

    @property
    def done(self) -> bool:
        """There are no more."""
        ...

    def take(self, room: int, wait: bool) -> list[Ready]:
        """The requests that have come, at most `room`.

        Args:
            room: requests that may be taken.
            wait: for one, if none has come. In a job of several processes there may still be none.

        Raises:
            BaseException: what the source raised, when the requests before it are taken.
        """
        ...

    def release(self) -> None:
        """A request that was taken has ended."""
        ...

    def close(self) -> None:
        """Read no more requests."""
        ...


def intake[Given, Ready](
    requests: Iterable[Given], prepare: Callable[[Given, int], Ready], most: int
) -> Intake[Given, Ready]:
    """The intake for a source.

    Args:
        requests: a sequence, which is read when there is room, or any other iterable, which is read on a thread.
        prepare: makes a request ready; gets its place in the source too. A thread may call it.
        most: requests that are read and have not ended.
    """
    if isinstance(requests, Sequence):
        return Listed(requests, prepare)
    return Reader(iter(requests), prepare, most)


class Listed[Given, Ready]:
    """Requests of a sequence."""

    def __init__(self, requests: Sequence[Given], prepare: Callable[[Given, int], Ready]):
        self._requests, self._prepare, self._taken = requests, prepare, 0

    @property
    def done(self) -> bool:
        return self._taken == len(self._requests)

    def take(self, room: int, wait: bool) -> list[Ready]:
        places = range(self._taken, min(self._taken + room, len(self._requests)))
        self._taken = places.stop
        return [self._prepare(self._requests[place], place) for place in places]

    def release(self) -> None: ...

    def close(self) -> None: ...


class _Last:
    """Stands in the queue behind the last request; holds what the source raised."""

    def __init__(self, error: BaseException | None):
        self.error = error


class Reader[Given, Ready]:
    """Requests of an iterator, read on a thread of their own, at most `most` that have not ended.

    In a job of several processes each reads its own iterator, and all must give the same requests. The first process
    says how many are taken, so that all take the same at the same time.

    A thread that waits inside of the source cannot be ended. It is a daemon, and ends when the source comes back.
    """

    def __init__(self, requests: Iterator[Given], prepare: Callable[[Given, int], Ready], most: int):
        self.done = False
        self._requests, self._prepare = requests, prepare
        self._permits = threading.Semaphore(most)
        self._closed = False
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        context = contextvars.copy_context()  # the source sees the caller's
        threading.Thread(target=context.run, args=(self._read,), name="requests", daemon=True).start()

    def take(self, room: int, wait: bool) -> list[Ready]:
        # Without room all permits are used, on every process: there is nothing to agree on.
        if self.done or not room:
            return []
        if jax.process_count() == 1:
            found = self._at_hand(wait, None)
        else:
            mine = self._at_hand(wait, LOOK) if jax.process_index() == 0 else []
            count = agree.from_first(len(mine))
            found = mine if jax.process_index() == 0 else [self._queue.get() for _ in range(count)]
        if found and isinstance(found[-1], _Last):
            last = found.pop()
            self.done = True
            if last.error is not None:
                raise last.error
        return found

    def _at_hand(self, wait: bool, seconds: float | None) -> list[Any]:
        found = []
        try:
            if wait:
                found.append(self._queue.get(timeout=seconds))
            while True:
                found.append(self._queue.get_nowait())
        except queue.Empty:
            return found

    def release(self) -> None:
        self._permits.release()

    def close(self) -> None:
        self._closed = True
        self._permits.release()

    def _read(self) -> None:
        error = None
        place = 0
        try:
            while self._permits.acquire() and not self._closed:
                try:
                    request = next(self._requests)
                except StopIteration:
                    break
                self._queue.put(self._prepare(request, place))
                place += 1
        except BaseException as raised:  # it is raised where the requests are taken
            error = raised
        self._queue.put(_Last(error))
