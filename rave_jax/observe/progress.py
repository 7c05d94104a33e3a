"""Progress of a run on the terminal: a bar where there is one, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


def duration(seconds: float) -> str:
    """`75` as `1:15`, `3700` as `1:01:40`."""
    minutes, secs = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class ProgressReport:
    """Shows loss, tokens per second and time left. Use as a context manager."""

    def __init__(self, total: int, done: int, *, enabled: bool = True, console: Console | None = None):
        """
        Args:
            total: steps of the whole run.
            done: steps finished before this process started.
            enabled: False on all but one process of a job.
            console: where to write; standard error by default, which leaves standard output to results.
        """
        self.console = console or Console(stderr=True, soft_wrap=True)
        self.enabled = enabled
        self._total, self._first, self._started = total, done, time.monotonic()
        self._bar: Progress | None = None
        if enabled and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("compiling the step", total=total, completed=done)

    def __enter__(self) -> ProgressReport:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def restart_clock(self, done: int) -> None:
        """Count time left from here: call it when the first step, which compiles, is done."""
        self._first, self._started = done, time.monotonic()

    def update(self, step: int, values: Mapping[str, float], *, line: bool) -> None:
        """Show that `step` steps are done.

        Args:
            step: finished steps of the run.
            values: `loss`, `accuracy` and `tokens_per_second` are shown where present.
            line: also leave a line behind (at logged steps, where there is no bar).
        """
        if not self.enabled:
            return
        done = step - self._first
        left = (time.monotonic() - self._started) / done * (self._total - step) if done > 0 else None
        shown = [f"{name} {values[name]:.4f}" for name in ("loss", "accuracy") if name in values]
        if "tokens_per_second" in values:
            shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
        if left is not None:
            shown.append(f"{duration(left)} left")
        text = "  ".join(shown)
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif line:
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.enabled:
            self.console.print(text, markup=False, highlight=False)
            sys.stderr.flush()


class CountBar:
    """Shows how far something is that is done before the steps of a run. Use as a context manager, and call it with
    (done, total)."""

    def __init__(self, what: str, *, enabled: bool = True, console: Console | None = None, every: float = 30.0):
        """
        Args:
            what: is counted, as "measuring samples".
            enabled: False on all but one process of a job.
            console: where to write; standard error by default.
            every: seconds between two lines where there is no bar.
        """
        self.console = console or Console(stderr=True, soft_wrap=True)
        self._what, self._enabled, self._every, self._said = what, enabled, every, time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> CountBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that so many of a total are done; the first call begins."""
        if not self._enabled:
            return
        if self.console.is_terminal:
            if self._bar is None:
                columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
                self._bar = Progress(*columns, console=self.console, transient=True)
                self._task = self._bar.add_task(self._what, total=total)
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._said >= self._every:
            self._said = time.monotonic()
            self.console.print(f"{self._what}: {done:,} of {total:,}", markup=False, highlight=False)
