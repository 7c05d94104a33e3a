"""The rule: which verdict an interval has, what several comparisons do to it, and when nothing is decided."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.evaluation.paired import EVERYTHING, Interval
from rave_jax.study.decision import Decision, compare, decide

RULE = Decision(seeds=3, floor=0.5, ceiling=0.9, margin=0.02)


@pytest.mark.parametrize(
    ("interval", "seeds", "control", "verdict", "why"),
    [
        (Interval(0.01, 0.05), 3, 0.7, "better", ""),
        (Interval(-0.05, -0.001), 3, 0.7, "worse", ""),
        (Interval(-0.019, 0.019), 3, 0.7, "same", "within 2 points"),
        (Interval(0.0, 0.0), 3, 0.7, "same", "within 2 points"),
        (Interval(0.0, 0.05), 3, 0.7, "not decided", "the interval holds 0"),
        (Interval(-0.02, 0.019), 3, 0.7, "not decided", "the interval holds 0"),
        (Interval(0.01, 0.05), 2, 0.7, "not decided", "2 seeds of at least 3"),
        (EVERYTHING, 1, 0.7, "not decided", "1 seed of at least 3"),
        (Interval(0.01, 0.05), 3, 0.49, "not decided", "the control's 49.0% is below 50%"),
        (Interval(0.01, 0.05), 3, 0.95, "not decided", "the control's 95.0% is above 90%"),
    ],
)
def test_the_first_line_that_applies_is_said(
    interval: Interval, seeds: int, control: float, verdict: str, why: str
) -> None:
    assert decide(interval, seeds, control, RULE) == (verdict, why)


def test_several_comparisons_take_a_decision_back() -> None:
    """Differences of 4, 5, 6, 7, 4 points and a wide one: t of four degrees is 2.78 alone, and 7.5 for 24."""
    control = dict.fromkeys(range(5), 0.7)
    found = {seed: 0.7 + gain for seed, gain in enumerate((0.01, 0.05, 0.06, 0.07, 0.03))}
    alone, many = (compare(found, control, n, RULE) for n in (1, 24))
    assert alone is not None and many is not None
    assert alone.verdict == many.alone == "better" and many.verdict == "not decided"
    assert alone.student == many.student == alone.corrected and many.corrected.low < 0 < many.student.low
    assert many.bootstrap.low > many.student.low, "the bootstrap of five seeds is narrower"


def test_the_control_is_taken_over_the_seeds_that_both_have() -> None:
    """The control's other seeds would put its mean below the floor."""
    control = {0: 0.7, 1: 0.7, 2: 0.7, 3: 0.0, 4: 0.0}
    found = compare({0: 0.8, 1: 0.8, 2: 0.81}, control, 1, RULE)
    assert found is not None and list(found.differences) == [0, 1, 2] and found.verdict == "better"
    assert compare({0: 0.8}, {1: 0.7}, 1, RULE) is None


@pytest.mark.parametrize("gain", [1 / 1024, -0.05])
def test_equal_differences_decide_nothing(gain: float) -> None:
    """Scores are shares of few questions: three seeds may differ by one question each, and a fourth by none."""
    control = {0: 0.7, 1: 0.75, 2: 0.8125}
    found = compare({seed: score + gain for seed, score in control.items()}, control, 23, RULE)
    assert found is not None and found.verdict == found.alone == "not decided"
    assert found.why == "all seeds differ by the same, which says nothing of another one"


@given(st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=6), st.integers(1, 40))
def test_a_verdict_is_one_that_the_only_comparison_would_have_too(gains: list[float], comparisons: int) -> None:
    """A correction takes decisions back and makes none, and better turned round is worse."""
    control = dict.fromkeys(range(len(gains)), 0.7)
    up, down = (
        compare({seed: 0.7 + sign * gain for seed, gain in enumerate(gains)}, control, comparisons, RULE)
        for sign in (1, -1)
    )
    assert up is not None and down is not None
    assert up.verdict in (up.alone, "not decided", "same")
    turned = {"better": "worse", "worse": "better"}
    near = min(abs(up.corrected.low), abs(up.corrected.high)) < 1e-9 or np.ptp(gains) < 1e-12
    assert near or down.verdict == turned.get(up.verdict, up.verdict) or "same" in (up.verdict, down.verdict)


def test_a_rule_that_no_control_can_meet_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"floor is 0.9, expected below the ceiling of 0.6"):
        Decision(floor=0.9, ceiling=0.6)
    with pytest.raises(ConfigError, match="seeds is 1"):
        Decision(seeds=1)
