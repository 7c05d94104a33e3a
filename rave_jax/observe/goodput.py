"""Where the time of a job goes: steps, and everything that keeps it from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

CAUSES = {
    "start": "the start",
    "compile": "compiling",
    "data": "waiting for data",
    "save": "waiting for saves",
    "evaluation": "evaluations",
}
"""What a job can spend time on beside steps, and how it is called."""


class Goodput:
    """Share of the time since the job began that went into steps, and the causes of the rest.

    Steps that are done again after a kill count as steps: the first line of a run that continues says how many.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """The job begins."""
        self._clock, self._began = clock, clock()
        self._seconds = dict.fromkeys(CAUSES, 0.0)

    def add(self, cause: str, seconds: float) -> None:
        """So much time went to this cause."""
        self._seconds[cause] += seconds

    @contextmanager
    def spent(self, cause: str) -> Generator[None]:
        """The time of what happens inside goes to this cause."""
        began = self._clock()
        try:
            yield
        finally:
            self.add(cause, self._clock() - began)

    def training_begins(self) -> None:
        """All time until here was the start."""
        self._seconds["start"] = self._clock() - self._began

    @property
    def elapsed(self) -> float:
        """Seconds since the job began."""
        return max(self._clock() - self._began, 1e-9)

    @property
    def share(self) -> float:
        """Share of the time that went into steps, 0 to 1."""
        return max(0.0, 1 - sum(self._seconds.values()) / self.elapsed)

    def seconds(self, cause: str) -> float:
        """Of one cause, so far."""
        return self._seconds[cause]

    def line(self) -> str:
        """All of it in a sentence."""
        causes = sorted(self._seconds, key=lambda cause: -self._seconds[cause])
        lost = [f"{CAUSES[cause]} {self._seconds[cause] / self.elapsed:.1%}" for cause in causes]
        return f"goodput: {self.share:.1%} of {self.elapsed:,.0f} s went into steps; {', '.join(lost)}"
