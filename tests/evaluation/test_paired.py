"""Paired differences: what is worked out by hand or tabled, and what intervals have to hold whatever the values are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.evaluation.paired import (
    EVERYTHING,
    bootstrap_interval,
    corrected_level,
    paired_differences,
    student_interval,
    student_quantile,
)

VALUES = st.lists(st.floats(-1, 1), min_size=2, max_size=8)


@pytest.mark.parametrize(
    ("probability", "degrees", "tabled"),
    # NIST/SEMATECH e-Handbook, section 1.3.6.7.2, to its three places; the first by tan(0.475 pi).
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 40, 2.021),
        (0.995, 4, 4.604),
        (0.999, 4, 7.173),
        (0.9, 10, 1.372),
    ],
)
def test_quantiles_are_the_tabled_ones(probability: float, degrees: int, tabled: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(tabled, abs=6e-4)
    assert student_quantile(1 - probability, degrees) == pytest.approx(-tabled, abs=6e-4)


def test_one_degree_is_cauchys_in_closed_form() -> None:
    assert student_quantile(0.975, 1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)


def test_three_seeds_by_hand() -> None:
    found = paired_differences({0: 0.71, 1: 0.74, 2: 0.80, 5: 0.1}, {0: 0.70, 1: 0.72, 2: 0.77, 4: 0.9})
    assert found == pytest.approx({0: 0.01, 1: 0.02, 2: 0.03})
    # Standard deviation 0.01, and t of two degrees of freedom is 4.3027.
    interval = student_interval([*found.values()])
    assert (interval.low, interval.high) == pytest.approx(
        (0.02 - 4.302653 * 0.01 / 3**0.5, 0.02 + 4.302653 * 0.01 / 3**0.5), rel=1e-6
    )


def test_the_interval_holds_the_truth_as_often_as_its_level_says() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.05, 0.02, (4000, 4))
    for level in (0.95, corrected_level(10)):
        held = [student_interval(values, level).holds(0.05) for values in drawn.tolist()]
        assert abs(np.mean(held) - level) < 0.01


def test_the_bootstrap_of_few_seeds_is_narrower_than_students_and_of_many_the_same() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(size=5).tolist(), rng.normal(size=400).tolist()

    def widths(values: list[float]) -> list[float]:
        return [one.high - one.low for one in (bootstrap_interval(values), student_interval(values))]

    bootstrap, student = widths(few)
    assert bootstrap < 0.8 * student
    bootstrap, student = widths(many)
    assert bootstrap == pytest.approx(student, rel=0.05)


def test_a_bootstrap_of_two_values_by_hand() -> None:
    """Their mean is the lower in a quarter of the draws, the higher in another, else the middle."""
    assert bootstrap_interval([0.0, 1.0], 0.6) == bootstrap_interval([0.0, 1.0], 0.9) == bootstrap_interval([1.0, 0.0])
    assert bootstrap_interval([0.0, 1.0], 0.4).low == bootstrap_interval([0.0, 1.0], 0.4).high == 0.5


@given(VALUES, st.floats(-1, 1), st.floats(0.1, 10))
def test_intervals_hold_the_mean_and_move_and_grow_with_the_values(
    values: list[float], by: float, times: float
) -> None:
    for interval in (student_interval, bootstrap_interval):
        found = interval(values)
        assert found.low - 1e-9 <= np.mean(values) <= found.high + 1e-9
        assert found == interval(values), "the same values, the same interval"
        other = interval([by + times * value for value in values])
        assert (other.low, other.high) == pytest.approx((by + times * found.low, by + times * found.high), abs=1e-6)
        turned = interval([-value for value in values])
        assert turned.low == pytest.approx(-found.high, abs=0.1) and turned.high == pytest.approx(-found.low, abs=0.1)


@given(VALUES, st.integers(1, 50))
def test_a_correction_widens(values: list[float], comparisons: int) -> None:
    plain, corrected = student_interval(values), student_interval(values, corrected_level(comparisons))
    assert corrected.low <= plain.low + 1e-12 and corrected.high >= plain.high - 1e-12
    assert corrected_level(1) == 0.95 and corrected_level(10) == pytest.approx(0.995)


def test_one_seed_has_no_interval_and_none_no_difference() -> None:
    assert student_interval([0.1]) == bootstrap_interval([0.1]) == EVERYTHING
    assert paired_differences({3: 0.5}, {2: 0.4}) == {}
