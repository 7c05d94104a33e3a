"""Attention laid out on a picture, and how much of it lies in a box, on maps made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.batch import Kind, TokenInfo
from rave_jax.layout import WHOLE, Shown
from rave_jax.look.maps import Look, area, coverage, on_grid, over_picture, relative_box

FRACTION = st.floats(0, 1)


def info(**codes: list[int]) -> TokenInfo:
    length = len(next(iter(codes.values())))
    zeros = np.zeros(length, np.int32)
    return TokenInfo(*(np.array(codes.get(name, zeros), np.int32) for name in TokenInfo._fields))


def test_weights_land_on_their_cells() -> None:
    # text, a 2 x 3 picture whose tokens stand out of order, text, a second picture of one token
    codes = info(
        image=[0, 1, 1, 1, 1, 1, 1, 0, 2],
        row=[0, 1, 0, 0, 0, 1, 1, 0, 0],
        col=[0, 2, 0, 1, 2, 0, 1, 0, 0],
        grid_h=[0, 2, 2, 2, 2, 2, 2, 0, 1],
        grid_w=[0, 3, 3, 3, 3, 3, 3, 0, 1],
    )
    weights = np.arange(9, dtype=np.float32).reshape(1, 1, 9)
    grid = on_grid(codes, weights)
    assert grid is not None and grid[0, 0].tolist() == [[2, 3, 4], [5, 6, 1]]
    second = on_grid(codes, weights, image=2)
    assert second is not None and second[0, 0].tolist() == [[8]]
    assert on_grid(codes, weights, image=3) is None


def test_tiles_and_the_whole_picture_add_up() -> None:
    """Two tiles of one row and two columns, side by side, then the whole picture on such a grid, then a learned end."""
    codes = info(image=[1, 1, 2, 2, 3, 3, 4], col=[0, 1] * 3 + [0], grid_h=[1] * 7, grid_w=[2] * 6 + [1])
    weights = np.array([[[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]]], np.float32)
    shown = [Shown(1, (0, 0, 0.5, 1)), Shown(1, (0.5, 0, 1, 1)), Shown(1, WHOLE), Shown(1, None)]
    found = over_picture(codes, weights, shown)
    assert found is not None and found[0, 0].tolist() == [[1 + 8, 2 + 8, 4 + 16, 8 + 16]]
    assert over_picture(codes, weights, shown, picture=2) is None
    second = over_picture(codes, weights, [*shown[:3], Shown(2, WHOLE)], picture=2)
    assert second is not None and second[0, 0].tolist() == [[64]]


def test_what_lies_beyond_a_picture_is_left_out_and_what_is_cropped_gets_nothing() -> None:
    codes = info(image=[1] * 4, col=[0, 1, 2, 3], grid_h=[1] * 4, grid_w=[4] * 4)
    weights = np.array([[[1.0, 2.0, 4.0, 8.0]]], np.float32)
    padded = over_picture(codes, weights, [Shown(1, (-0.5, 0, 1.5, 1))])
    assert padded is not None and padded[0, 0].tolist() == [[2, 4]]
    cropped = over_picture(codes, weights, [Shown(1, (0.25, 0, 0.75, 1))])
    assert cropped is not None and cropped[0, 0].tolist() == [[0, 0, 1, 2, 4, 8, 0, 0]]


@given(st.floats(-1, 0.4), st.floats(0.6, 3), st.integers(1, 9))
def test_a_part_of_a_picture_keeps_what_lies_on_the_picture(low: float, high: float, cells: int) -> None:
    codes = info(image=[1] * cells, col=list(range(cells)), grid_h=[1] * cells, grid_w=[cells] * cells)
    found = over_picture(codes, np.ones((1, 1, cells), np.float32), [Shown(1, (low, 0, high, 1))])
    on = (min(high, 1) - max(low, 0)) / (high - low)
    assert found is not None and found.sum() == pytest.approx(cells * on, rel=1e-4)


def test_frames_of_a_video_add_up() -> None:
    codes = info(image=[1, 1, 1, 1], frame=[0, 0, 1, 1], col=[0, 1, 0, 1], grid_h=[1] * 4, grid_w=[2] * 4)
    grid = on_grid(codes, np.array([[[1.0, 2.0, 4.0, 8.0]]]))
    assert grid is not None and grid[0, 0].tolist() == [[5, 10]]


def test_context_tokens_are_in_no_cell() -> None:
    """They carry the picture's number, and a place behind it that is none of its cells."""
    kind = [Kind.VISUAL, Kind.VISUAL, Kind.CONTEXT, Kind.CONTEXT]
    codes = info(kind=kind, image=[1] * 4, row=[0, 0, 0, 1], col=[0, 1, 0, 0], grid_h=[1] * 4, grid_w=[2] * 4)
    grid = on_grid(codes, np.array([[[1.0, 2.0, 4.0, 8.0]]]))
    assert grid is not None and grid[0, 0].tolist() == [[1, 2]]


def test_share_in_a_box_by_hand() -> None:
    """One layer looks at the left half, the other at one corner; the box is the upper left quarter, then one beside."""
    weights = np.zeros((2, 1, 2, 2), np.float32)
    weights[0, 0] = [[0.3, 0.0], [0.3, 0.0]]
    weights[1, 0] = [[0.0, 0.0], [0.0, 0.2]]
    look = Look(weights)
    box = relative_box((0, 0, 50, 20), width=100, height=40)
    assert box == (0, 0, 0.5, 0.5)
    assert look.on_picture == pytest.approx(0.4)
    assert look.in_box(box) == pytest.approx(0.3 / 0.8)
    assert look.in_box(box, layers=(0,)) == pytest.approx(0.5)
    assert look.in_box(box, layers=(1,)) == 0.0
    assert look.in_box((0.25, 0.0, 0.75, 0.5), layers=(0,)) == pytest.approx(0.25)
    assert look.heat((1,)).tolist() == [[0, 0], [0, 1]]
    # Of a model in which layers 3 and 7 attend and the others do not.
    some = Look(weights, (3, 7))
    assert some.in_box(box) == look.in_box(box) and some.heat((7,)).tolist() == look.heat((1,)).tolist()
    assert some.on_picture_by_head((3,)).tolist() == look.on_picture_by_head((0,)).tolist()


def test_multiples_of_even_attention_by_hand() -> None:
    """A head that looks at one of four cells puts 4 times the even share there; an even one 1 everywhere."""
    weights = np.zeros((2, 2, 2, 2), np.float32)
    weights[:, 0, 1, 0] = 0.1
    weights[0, 1], weights[1, 1] = 0.15, 0.05
    look = Look(weights)
    np.testing.assert_allclose(look.times_even_by_head(), [[[0, 0], [4, 0]], [[1, 1], [1, 1]]], rtol=1e-6)
    np.testing.assert_allclose(look.on_picture_by_head(), [0.1, 0.4], rtol=1e-6)
    np.testing.assert_allclose(look.on_picture_by_head((0,)), [0.1, 0.6], rtol=1e-6)
    # Both heads together: 0.1 on each cell, and 0.1 more on the one, of 0.5 over four cells.
    np.testing.assert_allclose(look.times_even(), [[0.8, 0.8], [1.6, 0.8]], rtol=1e-6)
    assert look.times_even((0,)).mean() == pytest.approx(1)
    dark = Look(np.zeros((1, 1, 2, 2), np.float32))
    assert dark.times_even().tolist() == dark.times_even_by_head()[0].tolist() == [[0, 0], [0, 0]]


def test_no_attention_on_the_picture_is_zero_everywhere() -> None:
    look = Look(np.zeros((1, 1, 2, 2), np.float32))
    assert look.in_box((0, 0, 1, 1)) == 0.0 and look.on_picture == 0.0


@given(FRACTION, FRACTION, FRACTION, FRACTION, st.integers(1, 7), st.integers(1, 7))
def test_even_attention_puts_the_area_in_the_box(a: float, b: float, c: float, d: float, rows: int, cols: int) -> None:
    box = (min(a, b), min(c, d), max(a, b), max(c, d))
    covered = coverage(box, (rows, cols))
    assert covered.shape == (rows, cols) and covered.min() >= 0 and covered.max() <= 1 + 1e-9
    even = Look(np.full((1, 2, rows, cols), 0.01, np.float32))
    assert even.in_box(box) == pytest.approx(area(box), abs=1e-5)
