"""The tasks under test, each with a picture size, and the scenes behind their samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rave_jax.data.synthetic import (
    Album,
    BarChart,
    Counting,
    DigitMosaic,
    LongReceipt,
    MosaicList,
    PositionMosaic,
    Receipt,
    Scatter,
)
from rave_jax.data.synthetic.base import Question, Split, generator

TASKS = [
    pytest.param(DigitMosaic(), 84, id="digit_mosaic"),
    pytest.param(DigitMosaic(frame=4), 112, id="digit_mosaic-frame"),
    pytest.param(MosaicList(), 84, id="mosaic_list"),
    pytest.param(PositionMosaic(), 84, id="position_mosaic"),
    pytest.param(PositionMosaic(min_grid=3, max_grid=4), 100, id="position_mosaic-4"),
    pytest.param(BarChart(), 84, id="bar_chart"),
    pytest.param(BarChart(marks="gridlines"), 84, id="bar_chart-gridlines"),
    pytest.param(BarChart(ask=("colour", "label"), max_value=40), 196, id="bar_chart-labels"),
    pytest.param(Counting(), 84, id="counting"),
    pytest.param(Counting(grid=4, max_count=9, ask=("both",)), 112, id="counting-both"),
    pytest.param(Receipt(), 224, id="receipt"),
    pytest.param(Scatter(), 84, id="scatter"),
    pytest.param(Scatter(max_objects=30, kinds=4, grid=6, clutter=9, writing="handwritten"), 112, id="scatter-30"),
    pytest.param(Scatter(ask="all"), 84, id="scatter-all"),
    pytest.param(LongReceipt(), 168, id="long_receipt"),
    pytest.param(LongReceipt(room=30, letters=2, digits=3, other_numbers=1), 280, id="long_receipt-numbers"),
    pytest.param(LongReceipt(ask="all"), 168, id="long_receipt-all"),
    pytest.param(Album(), 56, id="album"),
    pytest.param(Album(same_colours=False, max_grid=3), 84, id="album-colours"),
    pytest.param(Album(ask="all"), 56, id="album-all"),
]


def scenes(task: Any, split: Split, number: int, count: int = 1) -> Iterator[tuple[Any, tuple[Question, ...], Any]]:
    """Scene, questions and the random stream after them, of a few samples."""
    for index in range(number):
        rng = generator(3, split, index)
        scene, asked = task.draw(rng, split, count)
        yield scene, asked, rng


def shown(task: Any, scene: Any, question: Question, image_size: int) -> np.ndarray:
    """The picture that a question is about."""
    painted = task.paint(scene, image_size)
    return painted if painted.ndim == 3 else painted[question.picture]
