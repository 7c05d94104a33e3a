"""How a job is told to end: signals are heard whatever a process does, and all processes stop after the same step.

Any process may get the signal. It leaves a note (`notes.py`) that the others read within a second. Then every process
leaves a note of how many steps it has begun, begins no other, and the largest of these counts is the step after which
all stop: a step that one process has begun runs on the devices of all, so the others have to begin it too.

The signal is heard by a thread of its own, since Python runs handlers in the main thread and between two
instructions only, and that thread may wait for a device, a compiler or a disk. The same thread ends the process when it
has not stopped in time.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

from rave_jax.parallel import hosts, notes

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130}
"""What the shell sees: 128 and the number of the signal."""
NOTHING = -1
"""Steps begun, of a process in which none has finished that is not saved already."""


class Interrupted(BaseException):
    """The job was asked to end. Not an Exception, like KeyboardInterrupt, so that no handler on the way swallows it."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Hears SIGTERM and SIGINT, agrees with the other processes, and sees to it that this one ends in time.

    Use as a context manager, in the main thread, around everything that a job does. Elsewhere signals are left alone.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    GRACE = 5.0
    """Seconds for the main thread to end by itself where nothing is left to save."""

    def __init__(self, timeout: float = 300.0, poll: float = 0.5):
        """
        Args:
            timeout: seconds from the request to the end of the process, whatever it waits for.
            poll: seconds between two looks at the notes of other processes.
        """
        self.timeout, self._poll = timeout, poll
        self.doing: Callable[[], str] = lambda: "the start of the job"
        """What the main thread waits for, in words."""
        self.asked: str | None = None
        """Why the job is to end, or None."""
        self.exit_code = 0
        self._change = threading.Condition()
        self._begun, self._last = NOTHING, None
        self._finished, self._in_loop, self._leaving = False, False, False
        self._told, self._raise, self._own = False, False, 0
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._closed = threading.Event()

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._main = threading.get_ident()
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
            self._thread = threading.Thread(target=self._watch, name="stop request", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        self._closed.set()
        os.write(self._pipe[1], b"\0")
        self._thread.join()  # before handlers are put back: a signal that it sends would end the process without a word
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        for end in self._pipe:
            os.close(end)

    # What the loop asks.

    @contextmanager
    def training(self) -> Generator[None]:
        """Inside, the main thread asks `may_begin` and stops by itself; outside, `Interrupted` is raised in it.

        A job may train several runs, one after the other.
        """
        self._in_loop = True
        try:
            yield
        finally:
            with self._change:
                self._in_loop = False
                self._begun, self._finished = NOTHING, False

    def may_begin(self, step: int) -> bool:
        """Is this step still to be run? Says so to the other processes. May wait until all have agreed."""
        with self._change:
            if not self.is_wanted(step):
                return False
            self._begun = step + 1
            return True

    def is_wanted(self, step: int) -> bool:
        """Is this step still to be run? May wait until all processes have agreed."""
        with self._change:
            self._change.wait_for(lambda: self.asked is None or self._last is not None)
            return self._last is None or step < self._last

    def finished(self) -> None:
        """A step has finished: from here on there is something to save."""
        self._finished = True

    def interrupted(self, how: str) -> Interrupted:
        """What the loop raises when it has stopped: `how` says after which step and what is saved."""
        self._leaving = True
        return Interrupted(f"{self.asked}: {how}", self.exit_code)

    def ask(self, why: str, exit_code: int) -> None:
        """Ask the whole job to end; a signal does the same.

        Args:
            why: for the messages of all processes.
            exit_code: of all processes.
        """
        notes.leave(f"stop/asked/{hosts.place().process}", f"{exit_code} {why}")
        self._accept(why, exit_code)

    # The thread.

    def _handle(self, _number: int, _frame: object) -> None:
        # The thread has heard the signal through the pipe. It calls this once more when the main thread is to leave.
        if self._raise and not self._in_loop and not self._closed.is_set():
            self._raise = False
            raise Interrupted(f"{self.asked}: stopped; the same command starts or continues the run", self.exit_code)

    def _watch(self) -> None:
        # Not `select.select`, which fails where a process has 1,024 files open, as one that reads data may.
        ready = selectors.DefaultSelector()
        ready.register(self._pipe[0], selectors.EVENT_READ)
        with ready:
            self._watch_pipe(ready)

    def _watch_pipe(self, ready: selectors.BaseSelector) -> None:
        while not self._closed.is_set():
            if ready.select(self._poll):
                for number in os.read(self._pipe[0], 64):
                    self._hear(number)
            if self._closed.is_set():
                return
            self._read_notes()
            if self.asked is not None:
                self._see_to_the_end()

    def _hear(self, number: int) -> None:
        if number not in self.SIGNALS:
            return
        if self._own:
            self._own -= 1
            return
        name = signal.Signals(number).name
        if self.asked is None:
            self.ask(name, EXIT_CODES[name])
        else:
            self._say(
                f"{name} again: already stopping, waits for {self.doing()}; kill -9 {os.getpid()} ends it at once"
            )

    def _accept(self, why: str, exit_code: int) -> None:
        with self._change:
            if self.asked is not None:
                return
            self.asked, self.exit_code, self._since = why, exit_code, time.monotonic()
            begun = self._begun if self._finished else NOTHING
            if hosts.place().processes == 1 or not notes.is_open():
                self._last = begun  # there is nobody to agree with, or not yet
            self._change.notify_all()
        notes.leave(f"stop/begun/{hosts.place().process}", str(begun))
        self._say(f"{why}: stopping; this takes at most {self.timeout:.0f} s (waits for {self.doing()})")

    def _read_notes(self) -> None:
        found = notes.read()
        here = str(hosts.place().process)
        if not hosts.failing.is_set():
            for key, text in found.items():
                if key.startswith("failed/") and key != f"failed/{here}":
                    # With its exit code: a scheduler that sees any of them knows whether to start the job again.
                    code, why = text.split(" ", 1)
                    hosts.end(int(code), f"process {key.removeprefix('failed/')} ended with an error: {why}")
        for key, text in found.items():
            if key.startswith("stop/asked/") and self.asked is None:
                code, why = text.split(" ", 1)
                process = key.removeprefix("stop/asked/")
                self._accept(f"{why} at process {process}" if why in EXIT_CODES else why, int(code))
        begun = [int(text) for key, text in found.items() if key.startswith("stop/begun/")]
        if self._last is None and begun and len(begun) == hosts.place().processes:
            with self._change:
                self._last = NOTHING if NOTHING in begun else max(begun)
                self._change.notify_all()

    def _see_to_the_end(self) -> None:
        waited = time.monotonic() - self._since
        if waited > self.timeout:
            lacking = "" if self._last is not None else "; not all processes answered"
            hosts.end(
                self.exit_code,
                f"{self.asked}: {self.doing()} did not end within {self.timeout:.0f} s (hosts.stop_timeout){lacking}; "
                "ended without saving; the same command continues after the newest checkpoint",
            )
        to_save = self._in_loop and (self._last != NOTHING or self._finished)
        if self._last is None or self._leaving or to_save:
            return
        # Nothing is left to save: before the first step has finished, or after the last one is saved.
        if not self._told:
            self._told = self._raise = True
        if self._raise and waited <= self.GRACE:
            self._own += 1
            # A signal and not `_thread.interrupt_main`, which wakes no call that sleeps or reads. Again and again: one
            # that comes just before such a call begins is heard only when the call ends.
            signal.pthread_kill(self._main, self.SIGNALS[0])
        elif waited > self.GRACE:
            hosts.end(
                self.exit_code,
                f"{self.asked}: stopped in {self.doing()}, with nothing to save; "
                "the same command starts or continues the run",
            )

    def _say(self, text: str) -> None:
        print(f"{hosts.place()}{text}", file=sys.stderr, flush=True)


def leave(code: int, seconds: float = 10.0, late: float = 30.0) -> NoReturn:
    """End the program with this code, in time: threads that wait for a dead disk would hold up the interpreter.

    In a job of several processes, jax aborts those that still live when process 0 has ended, with a stack of C++ and
    another exit code. So process 0 is the last.

    Args:
        code: of the program.
        seconds: for the interpreter to end.
        late: seconds that process 0 waits for the others.
    """

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    sys.stdout.flush()
    sys.stderr.flush()
    here = hosts.place()
    if here.processes > 1 and notes.is_open():
        notes.leave(f"left/{here.process}", str(code))
        if here.process == 0:
            notes.gather("left", here.processes, late)
            time.sleep(0.5)  # from the note of another to its end
        os._exit(code)
    threading.Thread(target=end, name="end", daemon=True).start()
    sys.exit(code)
