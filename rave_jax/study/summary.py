"""What the rows of a study say: means with intervals, comparisons with controls, curves with bands."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from rave_jax.evaluation.paired import EVERYTHING, Interval, corrected_level, paired_differences, student_interval
from rave_jax.study.config import OVERALL, Arm, Study
from rave_jax.study.decision import Comparison, compare
from rave_jax.study.rows import Row

Kept = Mapping[str, Mapping[int, Row]]
"""Rows of each arm, by seed."""


class Band(NamedTuple):
    """A curve over seeds: at each step the mean, and its 95 % interval; everything where one seed has it."""

    steps: list[float]
    mean: list[float]
    intervals: list[Interval]


class ArmSummary(NamedTuple):
    """One line of the table.

    Fields:
        arm: which.
        seeds: that have a row.
        missing: seeds that have none.
        scores: of the mean over tasks ("all") and of each task, by seed.
        mean: of the overall score; None without rows.
        interval: 95 % of it.
        findings: means of what else was measured, over the seeds that have it.
        added: numbers in the parameters that the arm adds; None without rows.
        comparison: with its control; None for a control, and where they share no seed.
        by_task: mean difference of each task and its 95 % interval, where there is a comparison.
        curves: by name.
    """

    arm: Arm
    seeds: list[int]
    missing: list[int]
    scores: dict[str, dict[int, float]]
    mean: float | None
    interval: Interval
    findings: dict[str, float]
    added: int | None
    comparison: Comparison | None
    by_task: dict[str, tuple[float, Interval]]
    curves: dict[str, Band]


class Family(NamedTuple):
    """The comparisons with one control.

    Fields:
        control: its name.
        comparisons: how many the study makes, finished or not.
        level: of each corrected interval.
        alone: arms that would be better or worse, each as the only comparison.
        decided: arms that are.
    """

    control: str
    comparisons: int
    level: float
    alone: list[str]
    decided: list[str]


class StartSummary(NamedTuple):
    """The arms of one start."""

    name: str
    arms: list[ArmSummary]
    families: list[Family]


def summarise(study: Study, kept: Kept) -> list[StartSummary]:
    """The table of every start."""
    return [_start(study, start.name, kept) for start in study.starts]


def _start(study: Study, name: str, kept: Kept) -> StartSummary:
    mine = [arm for arm in study.arms if arm.start == name]
    arms = [_arm(study, arm, kept) for arm in mine]
    families = []
    for control in dict.fromkeys(arm.control for arm in mine if arm.control):
        of = [one for one in arms if one.arm.control == control]
        told = [(one.arm.name, one.comparison) for one in of if one.comparison is not None]
        families.append(
            Family(
                control,
                len(of),
                corrected_level(len(of)),
                [arm for arm, found in told if found.alone in ("better", "worse")],
                [arm for arm, found in told if found.verdict in ("better", "worse")],
            )
        )
    return StartSummary(name, arms, families)


def _arm(study: Study, arm: Arm, kept: Kept) -> ArmSummary:
    rows, control = kept.get(arm.name, {}), kept.get(arm.control, {})
    scores = _scores(study, rows)
    overall = [*scores[OVERALL].values()]
    comparison, by_task = None, {}
    if arm.control:
        theirs = _scores(study, control)
        comparisons = sum(other.control == arm.control for other in study.arms)
        comparison = compare(scores[OVERALL], theirs[OVERALL], comparisons, study.decision)
        for task in study.tasks if comparison is not None else ():
            values = [*paired_differences(scores[task.name], theirs[task.name]).values()]
            by_task[task.name] = (statistics.mean(values), student_interval(values))
    names = dict.fromkeys(name for row in rows.values() for name in row.findings)
    return ArmSummary(
        arm,
        seeds=sorted(rows),
        missing=[seed for seed in study.seeds if seed not in rows],
        scores=scores,
        mean=statistics.mean(overall) if overall else None,
        interval=student_interval(overall) if overall else EVERYTHING,
        findings={n: statistics.mean(row.findings[n] for row in rows.values() if n in row.findings) for n in names},
        added=next((row.parameters["added"] for row in rows.values()), None),
        comparison=comparison,
        by_task=by_task,
        curves={name: band(rows, name) for name in dict.fromkeys(n for row in rows.values() for n in row.curves)},
    )


def _scores(study: Study, rows: Mapping[int, Row]) -> dict[str, dict[int, float]]:
    of_tasks = {task.name: {seed: row.scores[task.name] for seed, row in rows.items()} for task in study.tasks}
    return {OVERALL: {seed: row.score for seed, row in rows.items()}, **of_tasks}


def band(rows: Mapping[int, Row], name: str) -> Band:
    """A curve over the seeds that have it, at the steps that all of them have."""
    curves = [{step: value for step, value in row.curves[name]} for row in rows.values() if name in row.curves]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    return Band(steps, [statistics.mean(one) for one in values], [student_interval(one) for one in values])
