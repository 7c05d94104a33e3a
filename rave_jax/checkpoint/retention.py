"""Which checkpoints of a run are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orbax.checkpoint import v1 as ocp

VALUE = "value"
"""Name under which orbax keeps a checkpoint's metric beside it."""


@dataclass(frozen=True)
class Retention:
    """A checkpoint is kept as long as one of these asks for it; the others are removed with the next save."""

    newest: int
    """So many of the newest."""
    every: int = 0
    """Those whose step is a multiple of this; 0 asks for none."""
    best: int = 0
    """So many with the best metric; one that was saved without a metric is none of them."""
    largest: bool = False
    """Is the largest metric the best?"""

    def most(self, steps: int, save_every: int) -> int:
        """The most checkpoints that a run has at one time, the one that is being written included."""
        saved = -(-steps // save_every)
        return min(saved, self.newest + self.best + (steps // self.every if self.every else 0)) + 1

    def policy(self) -> Any:
        """The same for orbax."""
        policies = ocp.training.preservation_policies
        asked: list[Any] = [policies.LatestN(self.newest)]
        if self.every:
            asked.append(policies.EveryNSteps(self.every))
        if self.best:
            asked.append(
                policies.BestN(
                    # orbax takes the last ones of an ascending order, or of a descending one.
                    get_metric_fn=lambda metrics: metrics[VALUE],
                    reverse=not self.largest,
                    n=self.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return policies.AnyPreservationPolicy(asked)
