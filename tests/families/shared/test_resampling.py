"""Pictures resized as torch resizes them; tests/parity/test_videos.py holds them against torch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rave_jax.families.shared.resampling import Filter, resized, weights
from tests.data.pictures import noise

FILTERS = pytest.mark.parametrize("filter", ["bicubic", "lanczos"])
SIZES = st.integers(1, 90)


@FILTERS
@given(st.integers(1, 500), st.integers(1, 500))
def test_weights_of_a_pixel_add_up_to_one(filter: Filter, old: int, new: int) -> None:
    matrix, bits = weights(old, new, filter)
    assert matrix.shape == (new, old) and matrix.dtype == np.int16
    np.testing.assert_allclose(matrix.sum(1, dtype=np.int64) / (1 << bits), 1, atol=1e-3)


@FILTERS
@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 255))
def test_a_picture_of_one_colour_stays_one(
    filter: Filter, height: int, width: int, rows: int, cols: int, value: int
) -> None:
    pixels = np.full((height, width, 3), (value, 0, 255), np.uint8)
    np.testing.assert_array_equal(resized(pixels, rows, cols, filter), np.full((rows, cols, 3), (value, 0, 255)))


@FILTERS
def test_a_picture_of_its_own_size_stays_as_it_is(filter: Filter) -> None:
    pixels = noise(17, 31)
    np.testing.assert_array_equal(resized(pixels, 17, 31, filter), pixels)


@FILTERS
def test_smaller_pictures_are_those_of_pillow_but_for_rounding(filter: Filter) -> None:
    pixels = noise(120, 90)
    theirs = Image.fromarray(pixels).resize((30, 41), Image.Resampling[filter.upper()])
    assert np.abs(resized(pixels, 41, 30, filter).astype(int) - np.asarray(theirs)).max() <= 1
