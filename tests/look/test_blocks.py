"""Blocks of a picture, and what hiding them costs, against loops."""

from __future__ import annotations

import numpy as np
import pytest

from rave_jax.batch import Kind, TokenInfo
from rave_jax.layout import WHOLE, Shown
from rave_jax.look.blocks import KnockOut, blocks_of


def info(*grids: tuple[int, int]) -> TokenInfo:
    """Two text tokens, and behind them pictures of so many rows and columns."""
    names = ("image", "kind", "row", "col", "grid_h", "grid_w")
    tokens = [(0, Kind.TEXT, 0, 0, 0, 0)] * 2
    for number, (rows, cols) in enumerate(grids, start=1):
        tokens += [(number, Kind.VISUAL, y, x, rows, cols) for y in range(rows) for x in range(cols)]
    columns = dict(zip(names, np.array(tokens, np.int32).T, strict=True))
    return TokenInfo(*(columns.get(name, np.zeros(len(tokens), np.int32)) for name in TokenInfo._fields))


def test_a_block_has_every_token_that_shows_it() -> None:
    """Two tiles side by side and the whole picture once more, coarser: by a loop over tokens and blocks."""
    grids = ((2, 2), (2, 2), (1, 2))
    boxes = ((0, 0, 0.5, 1), (0.5, 0, 1, 1), WHOLE)
    codes = info(*grids)
    shown = [Shown(1, box) for box in boxes]
    found = blocks_of(codes, shown)
    assert found is not None and (found.rows, found.cols) == (2, 4)
    for token, (image, row, col) in enumerate(zip(codes.image, codes.row, codes.col, strict=True)):
        for block in range(8):
            x, y = (block % 4 + 0.5) / 4, (block // 4 + 0.5) / 2
            expected = False
            if image:
                (h, w), (x1, y1, x2, y2) = grids[image - 1], boxes[image - 1]
                left, top = x1 + (x2 - x1) * col / w, y1 + (y2 - y1) * row / h
                expected = left <= x < left + (x2 - x1) / w and top <= y < top + (y2 - y1) / h
            assert found.shows[block, token] == expected
    assert found.shows.sum(1).tolist() == [2] * 8, "its tile and the whole picture"
    assert blocks_of(codes, shown, picture=2) is None


def test_a_second_picture_has_blocks_of_its_own() -> None:
    found = blocks_of(info((2, 2), (1, 3)), picture=2)
    assert found is not None and (found.rows, found.cols) == (1, 3)
    assert [np.flatnonzero(of).tolist() for of in found.shows] == [[6], [7], [8]]


@pytest.mark.parametrize("most", [1, 5, 12, 47, 48, 100])
def test_there_are_as_many_blocks_as_asked_for_at_most(most: int) -> None:
    codes = info((6, 8))
    found = blocks_of(codes, most=most)
    assert found is not None
    assert found.rows * found.cols <= most and (found.rows * found.cols == 48) == (most >= 48)
    assert found.shows.any(1).all(), "no block is empty"
    assert np.all(found.shows.any(0) == (codes.kind == Kind.VISUAL)), "every visual token is in one"


def test_what_lies_beyond_the_picture_is_in_no_block() -> None:
    found = blocks_of(info((1, 4)), [Shown(1, (-0.5, 0, 1.5, 1))])
    assert found is not None
    assert [np.flatnonzero(of).tolist() for of in found.shows] == [[3], [4]]
    assert blocks_of(info((1, 1)), [Shown(1, None)]) is None


def test_falls_are_counted_where_the_box_covers_them_and_rises_are_not() -> None:
    falls = np.array([[2.0, -1.0, 0.5], [0.25, 0.0, 1.25]])
    found = KnockOut(falls, 3.0, -0.2)
    covered = ((1, 0.5, 0), (0.5, 0.25, 0))
    expected = sum(max(falls[y, x], 0) * covered[y][x] for y in range(2) for x in range(3))
    assert found.in_box((0.0, 0.0, 0.5, 0.75)) == pytest.approx(expected)
    assert found.times_even().mean() == pytest.approx(1)
    assert np.all(KnockOut(-np.ones((2, 2)), 0.0, 0.0).times_even() == 1), "nothing falls"
