"""Differences between two ways to train, over runs that share their seeds: means, intervals, and whether they decide.

Runs of one seed share start, data and held-out samples, so each seed gives one difference. The interval is Student's,
at 95 %, over the seeds' differences: mean +- t s / sqrt(n), with s their standard deviation and t of n - 1 degrees of
freedom.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Quantile 0.975 of Student's t with 1, 2, ... degrees of freedom, from the usual tables (e.g. NIST/SEMATECH e-Handbook,
# section 1.3.6.7.2).
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Difference:
    """Mean difference of scores over seeds, with its 95 % interval; the interval of one seed is infinite."""

    seeds: int
    mean: float
    half_width: float

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half_width


def t_975(degrees: int) -> float:
    """Quantile 0.975 of Student's t: from the table, beyond it by the expansion of Abramowitz and Stegun, 26.7.5.

    Args:
        degrees: of freedom, at least 1.
    """
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def paired_difference(scores: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """`scores` less `base`, over the seeds that both have; None where they share none.

    Args:
        scores, base: score of each seed.
    """
    found = [scores[seed] - base[seed] for seed in sorted(scores.keys() & base.keys())]
    if not found:
        return None
    if len(found) == 1:
        return Difference(1, found[0], math.inf)
    half = t_975(len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return Difference(len(found), statistics.mean(found), half)


def undecided(difference: Difference, base: Sequence[float], *, floor: float, widest: float) -> str | None:
    """Why the difference decides nothing, in a few words; None where it does.

    Args:
        difference: of scores, 0 to 1.
        base: scores that were compared with.
        floor: what they must reach on the average: differences of models that cannot do the task say nothing.
        widest: most from end to end of the interval.
    """
    if statistics.mean(base) < floor:
        return f"base {statistics.mean(base):.1%} < {floor:.0%}"
    if difference.seeds == 1:
        return "one seed"
    if 2 * difference.half_width > widest:
        return f"interval of {200 * difference.half_width:.1f} points"
    return None
