"""Does training wait for its data?"""

from __future__ import annotations

SAID = tuple(10**n for n in range(9))
"""Windows that waited too long at which it is said: the first, the tenth, the hundredth ..."""


class WaitMeter:
    """Share of the time that steps waited for a batch, judged over windows of steps."""

    def __init__(self, window: int = 50, share: float = 0.2):
        """Warn when more than `share` of the time of `window` steps went to waiting."""
        self._window, self._share = window, share
        self._steps, self._waited, self._elapsed = 0, 0.0, 0.0
        self._slow = 0

    def add(self, waited: float, elapsed: float) -> str | None:
        """Count one step.

        Args:
            waited: seconds until its batch was there.
            elapsed: seconds of the whole step, waiting included.

        Returns:
            A warning to show at the end of a window that waited too long, else None. It is not said of every window.
        """
        self._steps += 1
        self._waited += waited
        self._elapsed += elapsed
        if self._steps < self._window:
            return None
        share, steps = self._waited / max(self._elapsed, 1e-9), self._steps
        self._steps, self._waited, self._elapsed = 0, 0.0, 0.0
        if share <= self._share:
            return None
        self._slow += 1
        if self._slow not in SAID:
            return None
        often = f", as {self._slow} times {steps} before them" if self._slow > 1 else ""
        return (
            f"warning: the last {steps} steps waited for data {share:.0%} of the time{often}; loading is the "
            "bottleneck: raise data.workers or data.prefetch, or load in processes (data.processes) if cores are idle"
        )
