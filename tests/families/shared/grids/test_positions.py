"""Positions against a literal reading of the rule (tests/parity compares with transformers itself)."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.families.pictures import Visual
from rave_jax.families.shared.grids.positions import mrope_positions

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
LAYOUT = st.lists(st.one_of(st.integers(1, 12), st.tuples(GRIDS, st.sampled_from([None, 0.25, 1.0, 2.0]))), max_size=9)


@given(LAYOUT, st.sampled_from([1, 2, 4, 25]))
def test_positions_follow_the_rule(layout: list, tokens_per_second: int) -> None:
    expected: list[tuple[int, int, int]] = []
    visuals = []
    position = 0
    for item in layout:
        if isinstance(item, int):
            expected += [(position + n,) * 3 for n in range(item)]
            position += item
            continue
        (t, h, w), seconds = item
        visuals.append(Visual(len(expected), (t, h, w), seconds))
        step = 1 if seconds is None else tokens_per_second * seconds
        for frame in range(t):
            for row in range(h):
                expected += [(position + int(frame * step), position + row, position + col) for col in range(w)]
        position += max(h, w, int((t - 1) * step) + 1)
    ours = mrope_positions(len(expected), visuals, tokens_per_second)
    np.testing.assert_array_equal(ours, np.array(expected, int).reshape(-1, 3).T)
