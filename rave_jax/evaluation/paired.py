"""Differences between two ways to train, over runs that share their seeds: means and intervals.

Runs of one seed share start, data and held-out samples, so each seed gives one difference. Student's interval of their
mean is mean +- t s / sqrt(n), with s their standard deviation and t a quantile of n - 1 degrees of freedom. It is exact
where differences are normal. The bootstrap's assumes no form: it is the range of the means of n differences drawn anew
from those found (Efron 1979, doi 10.1214/aos/1176344552, percentile interval). With few seeds it is too narrow: of n
equal in spread its standard error is sqrt((n - 1) / n) of the right one, and its quantiles are the normal's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL = 0.95
"""Of the intervals that are shown."""
DRAWS = 10_000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Interval:
    """An interval, ends included; at 95 % where nothing else is said."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Is the value in it?"""
        return self.low <= value <= self.high


EVERYTHING = Interval(-math.inf, math.inf)


def student_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t.

    Args:
        probability: above 0 and below 1.
        degrees: of freedom, above 0.
    """
    return float(special.stdtrit(degrees, probability))


def t_975(degrees: int) -> float:
    """Quantile 0.975 of Student's t, that of 95 % intervals."""
    return student_quantile(0.975, degrees)


def student_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Where the mean of more such values lies; everything where there is one value only.

    Args:
        values: at least one.
        level: probability that such an interval holds the mean.
    """
    n = len(values)
    if n == 1:
        return EVERYTHING
    mean = statistics.mean(values)
    half = student_quantile((1 + level) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean - half, mean + half)


def bootstrap_interval(values: Sequence[float], level: float = LEVEL, seed: int = 0) -> Interval:
    """The percentile bootstrap's interval of the mean; everything where there is one value only.

    Args:
        values: at least one.
        level: share of the means of redrawn values that lie within.
        seed: of the draws. The same values give the same interval.
    """
    n = len(values)
    if n == 1:
        return EVERYTHING
    drawn = np.random.default_rng(seed).choice(np.asarray(values, np.float64), (DRAWS, n)).mean(axis=1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def paired_differences(scores: Mapping[int, float], base: Mapping[int, float]) -> dict[int, float]:
    """`scores` less `base` of each seed that both have, seeds ascending."""
    return {seed: scores[seed] - base[seed] for seed in sorted(scores.keys() & base.keys())}


def corrected_level(comparisons: int, level: float = LEVEL) -> float:
    """Level of each of several intervals at which all of them hold at once with probability `level` or more.

    Bonferroni's: 1 - (1 - level) / comparisons. It asks nothing of how the comparisons depend on one another; those
    with one control do.

    Args:
        comparisons: at least one.
        level: of all together.
    """
    return 1 - (1 - level) / comparisons
