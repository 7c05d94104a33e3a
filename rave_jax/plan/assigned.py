"""The module of a step before code is made of it: what the compiler writes down when every array has its place.

By then the compiler has scheduled the module, with its collectives, and has placed all arrays in memory: all that a
plan says. Most of the time of a compile follows: the code of each kernel. It changes none of this.
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SPACE = re.compile(r"Memory Space: \S+ \(color=(\d+)\)\nTotal bytes: (\d+)")
_HBM, _HOST = 0, 5
"""The compiler's numbers of the memories."""
_OFTEN = 0.1
"""Seconds between two looks."""
_STILL = 0.5
"""Seconds for which a file has not changed that is written to the end."""


@dataclasses.dataclass(frozen=True)
class Assigned:
    """A module whose arrays have their places.

    Args:
        text: of the module.
        hbm: bytes of a chip that its arrays take, arguments among them.
        host: bytes of the host's memory that they take.
    """

    text: str
    hbm: int
    host: int


def dump_flags(folder: Path, module: str) -> str:
    """XLA_FLAGS under which the compiler writes down what `read_assigned` reads.

    Args:
        folder: to write to.
        module: name of the compiled function.
    """
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_{module}"


def read_assigned(folder: Path) -> Assigned | None:
    """What the compiler wrote down of a module, once it has written all of it; None before."""
    # The module's text is written after the report.
    found = list(folder.glob("*.after_optimizations.txt"))
    if not found or time.time() - found[0].stat().st_mtime < _STILL:
        return None
    text, report = found[0].read_text(), found[0].with_name(found[0].stem + "-memory-usage-report.txt")
    if not text.rstrip().endswith("}"):
        return None
    spaces = {int(number): int(size) for number, size in _SPACE.findall(report.read_text())}
    return Assigned(text, spaces[_HBM], spaces.get(_HOST, 0))


def until_assigned(compile_it: Callable[[], Any], folder: Path) -> Assigned:
    """Start a compile, and wait until arrays have their places; it goes on beside what the caller does next.

    Args:
        compile_it: compiles, in a process whose flags are `dump_flags`.
        folder: of the flags.

    Raises:
        Exception: what `compile_it` raises, where it ends before.
        RuntimeError: it ended, and has written nothing.
    """
    failed: list[Exception] = []

    def run() -> None:
        try:
            compile_it()
        except Exception as error:  # it belongs to the caller
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        thread.join(_OFTEN)
        ended = not thread.is_alive()
        if failed:
            raise failed[0]
        if ended:
            time.sleep(2 * _STILL)
        if (found := read_assigned(folder)) is not None:
            return found
        if ended:
            raise RuntimeError(f"the compiler has written no module to {folder}")
