"""When a difference decides something: one rule, stated on every page.

Of an arm and its control, under the seeds that both have run, the corrected interval is Student's at the level at which
the intervals of all comparisons with that control hold at once (Bonferroni). The first line that applies is said:

    fewer seeds than `seeds`                       not decided
    the control's mean is not in [floor, ceiling]  not decided: it cannot do the task, or leaves no room
    all seeds differ by the same, and not by 0     not decided: scores are shares of few questions, so equal differences
                                                   happen, and their spread says nothing of the next seed
    the interval lies above 0                      better
    the interval lies below 0                      worse
    the interval lies within -margin .. margin     the same within the margin
    else                                           not decided
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rave_jax.config import check_fields, check_ranges, require
from rave_jax.evaluation.paired import (
    Interval,
    bootstrap_interval,
    corrected_level,
    paired_differences,
    student_interval,
)


@dataclass(frozen=True)
class Decision:
    """When a difference of scores decides something."""

    seeds: int = 3
    """Least seeds that arm and control share."""
    floor: float = 0.0
    """Least mean score of the control: below it, it cannot do the task."""
    ceiling: float = 1.0
    """Largest mean score of the control: above it, there is no room for an arm to be better."""
    margin: float = 0.01
    """Differences of less than this do not matter: an interval within it says "the same"."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_ranges(self, seeds=(2, 10**6), floor=(0, 1), ceiling=(0, 1), margin=(0, 1))
        require(self.floor < self.ceiling, "floor", self.floor, f"below the ceiling of {self.ceiling}")


ROUNDING = 1e-9
"""Scores that differ by less are equal: one question of a million is more."""

Verdict = Literal["better", "worse", "same", "not decided"]


class Comparison(NamedTuple):
    """An arm against its control.

    Fields:
        differences: of scores, by seed.
        mean: of the differences.
        student: their 95 % interval.
        bootstrap: the same by the bootstrap.
        corrected: Student's interval for several comparisons.
        verdict: what is decided.
        why: what speaks against a decision, or how it was reached, in a few words.
        alone: the verdict if this were the only comparison.
    """

    differences: Mapping[int, float]
    mean: float
    student: Interval
    bootstrap: Interval
    corrected: Interval
    verdict: Verdict
    why: str
    alone: Verdict


def compare(
    scores: Mapping[int, float], control: Mapping[int, float], comparisons: int, rule: Decision
) -> Comparison | None:
    """What an arm's scores say against its control's; None where they share no seed.

    Args:
        scores, control: score of each seed, 0 to 1.
        comparisons: with this control, that the study makes.
        rule: by which is decided.
    """
    differences = paired_differences(scores, control)
    if not differences:
        return None
    values = [*differences.values()]
    student, corrected = student_interval(values), student_interval(values, corrected_level(comparisons))
    level = statistics.mean(control[seed] for seed in differences)
    verdict, why = decide(corrected, len(values), level, rule)
    alone, _ = decide(student, len(values), level, rule)
    return Comparison(
        differences, statistics.mean(values), student, bootstrap_interval(values), corrected, verdict, why, alone
    )


def points(share: float) -> str:
    """A difference of scores in words."""
    return f"{100 * share:g} point{'s' * (share != 0.01)}"


def decide(interval: Interval, seeds: int, control: float, rule: Decision) -> tuple[Verdict, str]:
    """The rule: a verdict, and its reason in a few words.

    Args:
        interval: of the mean difference.
        seeds: that it is of.
        control: the control's mean score.
        rule: its numbers.
    """
    if seeds < rule.seeds:
        return "not decided", f"{seeds} seed{'s' * (seeds != 1)} of at least {rule.seeds}"
    if control < rule.floor:
        return "not decided", f"the control's {control:.1%} is below {rule.floor:.0%}"
    if control > rule.ceiling:
        return "not decided", f"the control's {control:.1%} is above {rule.ceiling:.0%}"
    if interval.high - interval.low < ROUNDING < max(interval.low, -interval.high):
        return "not decided", "all seeds differ by the same, which says nothing of another one"
    if interval.low > 0:
        return "better", ""
    if interval.high < 0:
        return "worse", ""
    if -rule.margin < interval.low and interval.high < rule.margin:
        return "same", f"within {points(rule.margin)}"
    return "not decided", "the interval holds 0"
