"""What a run measures of its own speed between two rows of metrics."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax

from rave_jax.observe.goodput import Goodput


class Work(NamedTuple):
    """What a step asks of the devices.

    Fields:
        flops: model FLOPs of a step with full rows, over all devices.
        peak: FLOP/s of all devices together, at most.
    """

    flops: float
    peak: float


class Meter:
    """Counts steps, and gives the numbers of a row."""

    def __init__(self, goodput: Goodput, work: Work | None = None):
        """
        Args:
            goodput: of the job.
            work: None where the devices' peak is not known.
        """
        self.goodput, self._work = goodput, work
        self._restart()

    def _restart(self) -> None:
        self._steps, self._tokens, self._images, self._waited = 0, 0, 0, 0.0
        self._clock, self._saves = time.monotonic(), self.goodput.seconds("save")

    def waited(self, seconds: float) -> None:
        """A step waited for its data."""
        self._waited += seconds
        self.goodput.add("data", seconds)

    def finished(self, tokens: int, images: int) -> None:
        """A step has finished."""
        self._steps += 1
        self._tokens += tokens
        self._images += images

    def evaluated(self, seconds: float) -> None:
        """An evaluation was run: its time is not the steps'."""
        self._clock += seconds
        self.goodput.add("evaluation", seconds)

    def take(self) -> dict[str, float]:
        """The numbers since the last row."""
        elapsed = max(time.monotonic() - self._clock, 1e-9)
        found = {
            "tokens_per_second": round(self._tokens / elapsed, 1),
            "images_per_second": round(self._images / elapsed, 2),
            "step_time": round(elapsed / max(self._steps, 1), 5),
            "waited_for_data": round(min(self._waited / elapsed, 1.0), 4),
            "waited_for_saves": round(min((self.goodput.seconds("save") - self._saves) / elapsed, 1.0), 4),
            "goodput": round(self.goodput.share, 4),
        }
        if self._work is not None:
            found["mfu"] = round(self._work.flops * self._steps / elapsed / self._work.peak, 4)
        self._restart()
        return found | _memory()


def _memory() -> dict[str, float]:
    """Peak memory of the fullest device of this process, in GiB and as a share; nothing where devices do not say."""
    found = {}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats and stats["peak_bytes_in_use"] >= found.get("hbm_gib", 0) * 2**30:
            found = {"hbm_gib": round(stats["peak_bytes_in_use"] / 2**30, 3)}
            if limit := stats.get("bytes_limit"):
                found["hbm_share"] = round(stats["peak_bytes_in_use"] / limit, 4)
    return found
