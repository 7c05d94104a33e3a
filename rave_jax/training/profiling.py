"""Profiles of a few steps, by config or by a signal, while a run goes on.

`kill -USR1 PID` has the next steps of that process profiled. TensorBoard and xprof read what is written.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rave_jax.checkpoint.saved_step import first_line
from rave_jax.config import check_ranges
from rave_jax.parallel import hosts

SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class Profile:
    """Steps that are profiled."""

    first: int = 10
    """The first step, counted from 1; 0 profiles only when SIGUSR1 asks for it."""
    steps: int = 3
    """How many, also of each SIGUSR1."""

    def __post_init__(self) -> None:
        check_ranges(self, first=(0, 2**31 - 1), steps=(1, 1000))


class Profiler:
    """Starts and stops the profiler of jax between steps."""

    def __init__(self, config: Profile, directory: Path, say: Callable[[str], None]):
        """
        Args:
            config: which steps.
            directory: each profile goes into STEP/ in it; of several processes, each into a folder of its own.
            say: tells where a profile is.
        """
        self._config, self._directory, self._say = config, directory, say
        self._asked, self._until, self._at = False, 0, directory

    def before(self, step: int) -> None:
        """Call it before each step, counted from 1."""
        if self._until and step >= self._until:
            self.close()
        if not self._until and (self._asked or step == self._config.first):
            self._asked = False
            here = hosts.place()
            self._at = self._directory / str(step)
            if here.processes > 1:
                self._at = self._at / f"process_{here.process}"
            with self._unharmed():
                jax.profiler.start_trace(str(self._at))
                self._until = step + self._config.steps

    def ask(self) -> None:
        """Profile the next steps."""
        self._asked = True

    def close(self) -> None:
        """End a profile that is under way."""
        if self._until:
            self._until = 0
            with self._unharmed():
                jax.profiler.stop_trace()
                self._say(f"profile: {self._at}")

    @contextlib.contextmanager
    def _unharmed(self) -> Generator[None]:
        """A profile that cannot be made or written, as on a full disk, is no reason to end a run."""
        try:
            yield
        except Exception as error:  # jax, XLA and file systems raise kinds of their own
            self._say(f"warning: there is no profile in {self._at}: {first_line(error)}")


@contextlib.contextmanager
def early_signals_ignored() -> Generator[None]:
    """Inside, SIGUSR1 does not end the process, as it would by default; for what a run does around its steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(SIGNAL, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(SIGNAL, before)


@contextlib.contextmanager
def on_signal(profiler: Profiler) -> Generator[None]:
    """Inside, SIGUSR1 asks for a profile. Outside of the main thread, where Python takes no handlers, it does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(_number: int, _frame: Any) -> None:
        profiler.ask()

    before = signal.signal(SIGNAL, heard)
    try:
        yield
    finally:
        signal.signal(SIGNAL, before)
        profiler.close()
