"""Loading for tests of `data/ahead.py`, with what a process of its own needs and no more."""

from __future__ import annotations

import os
import signal
import sys
from typing import NamedTuple

from rave_jax.data.collate import BatchShape, empty_batch
from rave_jax.data.pipeline import Rows
from rave_jax.data.sample import OverBudget
from rave_jax.data.skips import Skip


class Loads(NamedTuple):
    """Rows that say which they are, up to a step that fails."""

    raises: int = 10**9
    """From this step on loading raises."""
    dies: int = 10**9
    """From this step on the process is killed."""

    def __call__(self, step: int, start: int, stop: int) -> Rows:
        if step >= self.raises:
            raise OverBudget(f"step {step} is over budget", 7, 9)
        if step >= self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = empty_batch(BatchShape(stop - start, 300, 0), 4)
        batch.tokens[:] = step * 1000 + start
        return Rows(batch, (None, Skip("a", step, "over budget", facts())))


def facts() -> str:
    """Which process this is, and whether jax has touched a device in it."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return f"{os.getpid()} {bool(bridge and bridge._backends)}"
