"""Ctrl-C that waits until it can do no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator


@contextlib.contextmanager
def remembered(*, replace: bool = True) -> Generator[Callable[[], bool]]:
    """Ctrl-C is only remembered; gives the function that says whether it came. A second one raises KeyboardInterrupt.

    An exception instead could come between a program that has consumed the cache and the line that keeps the new one.
    Python takes signals in the main thread alone; elsewhere nothing comes.

    Args:
        replace: replace a handler of Ctrl-C that is there already; otherwise only from Python itself.
    """
    came = False

    def remember(*_: object) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.getsignal(signal.SIGINT)
    mine = threading.current_thread() is threading.main_thread()
    mine = mine and (replace or before is signal.default_int_handler)
    if mine:
        signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: came
    finally:
        if mine:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def held() -> Generator[None]:
    """KeyboardInterrupt comes at the end of what happens inside, where Python would raise it in between."""
    with remembered(replace=False) as came:
        yield
    if came():
        raise KeyboardInterrupt
