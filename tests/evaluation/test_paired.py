"""Paired differences: what is worked out by hand, and when they decide nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rave_jax.evaluation.paired import Difference, paired_difference, undecided


def test_three_seeds_by_hand() -> None:
    found = paired_difference({0: 0.71, 1: 0.74, 2: 0.80, 5: 0.1}, {0: 0.70, 1: 0.72, 2: 0.77, 4: 0.9})
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(0.02)
    # Differences 0.01, 0.02, 0.03: standard deviation 0.01, and t of two degrees of freedom is 4.303.
    assert found.half_width == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((found.mean - found.half_width, found.mean + found.half_width))


def test_the_interval_holds_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(4000):
        base = rng.normal(0.7, 0.1, 4)
        scores = base + 0.05 + rng.normal(0, 0.02, 4)
        found = paired_difference(dict(enumerate(scores)), dict(enumerate(base)))
        assert found is not None
        held.append(found.low <= 0.05 <= found.high)
    assert 0.94 < np.mean(held) < 0.96


def test_one_seed_has_no_interval_and_none_no_difference() -> None:
    one = paired_difference({3: 0.5}, {3: 0.4})
    assert one is not None and one.mean == pytest.approx(0.1) and one.high == math.inf
    assert paired_difference({3: 0.5}, {2: 0.4}) is None


def test_many_seeds_take_students_quantile() -> None:
    rng = np.random.default_rng(1)
    scores = dict(enumerate(rng.random(40)))
    found = paired_difference(scores, dict.fromkeys(scores, 0.0))
    assert found is not None
    assert found.half_width == pytest.approx(2.0227 * np.std(list(scores.values()), ddof=1) / math.sqrt(40), 1e-4)


@pytest.mark.parametrize(
    ("difference", "base", "said"),
    [
        (Difference(3, 0.01, 0.005), [0.7, 0.8], None),
        (Difference(3, 0.01, 0.0075), [0.6], None),
        (Difference(3, 0.01, 0.008), [0.7, 0.8], "interval of 1.6 points"),
        (Difference(3, 0.01, 0.005), [0.55, 0.6], "base 57.5% < 60%"),
        (Difference(1, 0.01, math.inf), [0.7], "one seed"),
    ],
)
def test_what_decides(difference: Difference, base: list[float], said: str | None) -> None:
    assert undecided(difference, base, floor=0.6, widest=0.015) == said
