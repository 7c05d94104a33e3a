"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rave_jax.typing import Float, NpArray

LINE, FAINT = "#0b7285", "#a5c9d1"


def smooth(values: Float[NpArray, "N"], window: int) -> Float[NpArray, "N"]:
    """Mean of each value and up to `window` - 1 values before it."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def save_loss_curve(path: Path, steps: Sequence[int], losses: Sequence[float], window: int) -> None:
    """Write the curve as PNG: every value faintly, their running mean over `window` values on top.

    Args:
        path: where to.
        steps, losses: the points, in order.
        window: values in the running mean.
    """
    figure = Figure(figsize=(7.8, 3.2), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=FAINT, linewidth=0.8)
    axes.plot(steps, smooth(np.asarray(losses, np.float64), window), color=LINE, linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
