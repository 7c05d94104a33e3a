"""A watchdog: ends the process, and says why, when something it waits for takes far too long.

A process that hangs keeps its heartbeat, so nothing else would end a job in which one process waits forever.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import sys
import threading
import time
from collections.abc import Generator
from typing import NamedTuple

from rave_jax.parallel import hosts
from rave_jax.parallel.stopping import StopRequest


class Activity(NamedTuple):
    """What the main thread waits for.

    Fields:
        what: in words: "step 7".
        since: when it began, of the monotonic clock.
        limit: seconds that it may take.
        advice: what to do when it takes longer.
        save: can the job still save and stop?
    """

    what: str
    since: float
    limit: float
    advice: str
    save: bool


class Watchdog:
    """Knows what the main thread waits for, and for how long it may. Use as a context manager."""

    EXIT_CODE = 75
    STEP, LONG = 2, 4
    """How many times as long a step may take as its data, and what is longer: compiling, saving, restoring."""

    def __init__(
        self,
        timeout: float,
        stop: StopRequest | None = None,
        poll: float = 1.0,
        setting: str = "hosts.step_timeout",
    ):
        """
        Args:
            timeout: seconds that data may take; 0 switches the watchdog off.
            stop: is told what is waited for; while it stops the job the watchdog rests.
            poll: seconds between two looks at the clock.
            setting: what the user sets the timeout with, for the message.
        """
        self._setting = setting
        self._timeout, self._stop, self._poll = timeout, stop, poll
        self._now: Activity | None = None
        self._closed = threading.Event()

    def doing(self) -> str:
        """What the main thread waits for, in words."""
        now = self._now
        return now.what if now else "the step under way"

    @contextlib.contextmanager
    def during(self, what: str, times: float = 1, advice: str = "", *, save: bool = False) -> Generator[None]:
        """What happens inside may take `times` the timeout.

        Args:
            what: names it in the message: "step 7".
            times: multiple of the timeout; `math.inf` only names what is waited for.
            advice: what to do when it takes longer.
            save: the main thread can still save and stop, so it is asked to before the process ends.
        """
        outer = self._now
        self._now = Activity(what, time.monotonic(), times * self._timeout, advice, save)
        try:
            yield
        finally:
            self._now = outer and outer._replace(since=time.monotonic())

    def again(self) -> None:
        """Something that is waited for has come, and more of its kind follows, with as much time."""
        if self._now is not None:
            self._now = self._now._replace(since=time.monotonic())

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """For work that has its own time limits."""
        with self.during("work with its own time limits", math.inf):
            yield

    def __enter__(self) -> Watchdog:
        if self._stop is not None:
            self._stop.doing = self.doing
        if self._timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._poll):
            now = self._now
            waited = 0.0 if now is None else time.monotonic() - now.since
            if now is None or waited <= now.limit or (self._stop is not None and self._stop.asked is not None):
                continue
            message = f"waited {waited:.0f} s for {now.what}, so the watchdog ends the job"
            message += f" ({self._setting} {self._timeout:g}){now.advice and '; ' + now.advice}"
            if now.save and self._stop is not None:
                self._stop.ask(message, self.EXIT_CODE)
                continue
            print(f"{hosts.place()}{message}; ending the process; its threads are in:", file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
            sys.stderr.flush()
            hosts.tell_the_others(message, self.EXIT_CODE)
            hosts.end(self.EXIT_CODE, "")
