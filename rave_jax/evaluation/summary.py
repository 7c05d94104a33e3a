"""What an evaluation found: numbers, JSON, and a table on the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rave_jax.evaluation.grounding import Verdict
from rave_jax.evaluation.intervals import difference_interval
from rave_jax.evaluation.probe import Finding

BY_TEXT, BY_TEMPLATE, OF_ALL = "answers_by_text", "answers_by_template", "answers_of_all"
GREY, REDEALT = "grey_pictures", "redealt"
FLOORS = (BY_TEXT, BY_TEMPLATE, OF_ALL, GREY)
HEADINGS = {
    BY_TEXT: "most frequent answer to the same question",
    BY_TEMPLATE: "most frequent answer to the same template",
    OF_ALL: "most frequent of all answers",
    GREY: "same model on grey pictures",
    REDEALT: "same model, evidence changed",
}


@dataclass(frozen=True)
class AboveFloor:
    """A score against the question-only floor: the largest of the controls that do not look.

    Attributes:
        name: the control that is largest.
        floor: its score.
        above: score less floor.
        low, high: 95 % interval of `above`, over pictures.
    """

    name: str
    floor: float
    above: float
    low: float
    high: float

    def sentence(self) -> str:
        """The finding in words."""
        decided = "above the floor" if self.low > 0 else "below the floor" if self.high < 0 else "not decided"
        above, low, high = (f"{100 * value:+.1f}" for value in (self.above, self.low, self.high))
        return (
            f"question-only floor {self.floor:.1%} ({HEADINGS[self.name]}); "
            f"score minus floor {above} points (95 %: {low} to {high}): {decided}"
        )


def above_floor(found: Sequence[tuple[float, Mapping[str, float], Hashable]]) -> AboveFloor | None:
    """The comparison of a score with its floor; None without controls.

    Args:
        found: of each sample its score, the scores of its controls, and which pictures it is about.
    """
    names = [name for name in FLOORS if name in found[0][1]]
    if not names:
        return None
    name = max(names, key=lambda name: mean(controls[name] for _, controls, _ in found))
    differences = [score - controls[name] for score, controls, _ in found]
    interval = difference_interval(differences, [pictures for _, _, pictures in found])
    floor = mean(controls[name] for _, controls, _ in found)
    return AboveFloor(name, floor, mean(differences), interval.low, interval.high)


@dataclass(frozen=True)
class TaskRow:
    """One line of the table: mean scores over the samples of a task.

    Attributes:
        pictures: how many different ones the samples are about; a sample without one counts as one.
        metric: how they are scored; "mixed" for several ways.
        low, high: 95 % interval of the score, over pictures (`evaluation/intervals.py`).
        controls: mean score of each control.
    """

    task: str
    samples: int
    pictures: int
    metric: str
    score: float
    low: float
    high: float
    controls: Mapping[str, float]


@dataclass(frozen=True)
class Summary:
    """What one evaluation found.

    Attributes:
        total: over all samples that could be asked.
        tasks: by name.
        broken: samples that could not be asked, by reason; they are in no score.
        floor: the score against the question-only floor, or None without one.
        verdict: of the grounding check, or None without one.
        findings: what each probe found, by its name; None where nothing was measured.
        pictures: files of the probes, relative to the evaluation's folder.
    """

    name: str
    total: TaskRow
    tasks: tuple[TaskRow, ...]
    broken: Mapping[str, int]
    floor: AboveFloor | None
    verdict: Verdict | None
    findings: Mapping[str, Finding | None]
    pictures: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data; `grounding` has the floor that counts beside the verdict's fields."""
        data = dataclasses.asdict(self)
        verdict, findings = data.pop("verdict"), data.pop("findings")
        last = {name: data.pop(name) for name in ("pictures", "seconds")}
        last["grounding"] = None if self.verdict is None else {**verdict, "floor": self.verdict.floor}
        return data | findings | last

    def values(self) -> dict[str, float]:
        """The main numbers by name, for the metrics of a run."""
        found = {"score": self.total.score}
        if len(self.tasks) > 1:
            found |= {f"score/{row.task}": row.score for row in self.tasks}
        if self.floor is not None:
            found["floor"] = self.floor.floor
        if REDEALT in self.total.controls:
            found[REDEALT] = self.total.controls[REDEALT]
        for name, finding in self.findings.items():
            found |= {} if finding is None else {f"{name}/{key}": value for key, value in finding.values().items()}
        return found

    def dumps(self) -> str:
        """The text of `summary.json`."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"


def mean(values: Iterable[float]) -> float:
    """Mean, 0 of nothing."""
    values = list(values)
    return sum(values) / max(len(values), 1)


def print_summary(summary: Summary, console: Console) -> None:
    """The table of one evaluation, then what its controls say and what its probes found."""
    table = Table(title=f"Evaluation: {summary.name}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("task")
    table.add_column("metric")
    table.add_column("samples", justify="right")
    table.add_column("score", justify="right", style="bold")
    table.add_column("95 %", justify="right")
    named = [(summary.floor is not None, "floor"), (REDEALT in summary.total.controls, "changed")]
    for there, heading in named:
        if there:
            table.add_column(heading, justify="right")
    for row in (*summary.tasks, summary.total):
        if row is summary.total:
            table.add_section()
        floor = max((value for name, value in row.controls.items() if name in FLOORS), default=0.0)
        values = (floor, row.controls.get(REDEALT, 0.0))
        controls = [f"{value:.1%}" for value, (there, _) in zip(values, named, strict=True) if there]
        interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
        table.add_row(row.task, row.metric.split("_")[0], f"{row.samples:,}", f"{row.score:.1%}", interval, *controls)
    console.print(table)
    if summary.floor is not None:
        console.print(summary.floor.sentence(), highlight=False, soft_wrap=True)
    notes = [f"95 %: interval over {summary.total.pictures:,} pictures"]
    if summary.floor is not None:
        notes.append("floor: the most frequent answer, or the same model on grey pictures")
    if REDEALT in summary.total.controls:
        notes.append("changed: the same model with the evidence changed, scored with the original answer")
    console.print("\n".join(notes), style="dim", highlight=False)
    if summary.broken:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.broken.items())
        console.print(f"left out: {reasons}", highlight=False)
    if summary.verdict is not None:
        for finding in summary.verdict.findings:
            console.print(f"grounding check {finding}", highlight=False, soft_wrap=True)
    for finding in summary.findings.values():
        for sentence in [] if finding is None else finding.sentences():
            console.print(sentence, highlight=False, soft_wrap=True)
