"""Curves over steps as pictures: the loss of a run, and means over runs with bands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rave_jax.typing import Float, NpArray

LINE, FAINT, BEHIND = "#0b7285", "#a5c9d1", "#868e96"
COLUMNS = 4
"""Panels side by side."""


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
    _plain(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


class Line(NamedTuple):
    """A mean over runs with its band.

    Fields:
        behind: drawn in grey, as what others are compared with.
        steps, mean, low, high: the points, in order.
    """

    behind: bool
    steps: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Panel(NamedTuple):
    """Lines under one title."""

    title: str
    lines: Sequence[Line]


def save_panels(path: Path, panels: Sequence[Panel], what: str) -> None:
    """Write panels of one scale as one PNG.

    Args:
        path: where to.
        panels: at least one.
        what: name of the vertical axis.
    """
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.1 * rows + 0.4), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for line in panel.lines:
            colour = BEHIND if line.behind else LINE
            axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(line.steps, line.mean, color=colour, linewidth=1.5)
        axes.set_title(panel.title, fontsize=9)
        _plain(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel(what, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plain(axes: Axes) -> None:
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
