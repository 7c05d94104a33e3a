"""Frames of a video are one position apart, whatever time lies between them."""

from __future__ import annotations

import numpy as np
import pytest

from rave_jax.families.pictures import Visual
from rave_jax.families.qwen2_vl.pictures import CountedPictures
from rave_jax.families.qwen2_vl.presets import tiny


@pytest.mark.parametrize("seconds", [0.25, 1.0, 7.0])
def test_frames_are_counted(seconds: float) -> None:
    positions = CountedPictures(tiny()).positions(2 + 3 * 4 + 2, [Visual(2, (3, 2, 2), seconds)])
    np.testing.assert_array_equal(positions[:, :2], [[0, 1]] * 3)
    np.testing.assert_array_equal(positions[0, 2:14], np.repeat([2, 3, 4], 4))
    np.testing.assert_array_equal(positions[1, 2:14], [2, 2, 3, 3] * 3)
    np.testing.assert_array_equal(positions[2, 2:14], [2, 3] * 6)
    np.testing.assert_array_equal(positions[:, 14:], [[5, 6]] * 3)
