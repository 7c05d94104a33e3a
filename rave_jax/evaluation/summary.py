"""What an evaluation found: numbers, JSON, and a table on the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rave_jax.evaluation.gate import Verdict
from rave_jax.evaluation.looking import Looking
from rave_jax.evaluation.routing import RoutingSummary
from rave_jax.evaluation.vas import Vas

BY_TEXT, BY_TEMPLATE, GREY, REDEALT = "answers_by_text", "answers_by_template", "grey_pictures", "redealt"
FLOORS = (BY_TEXT, BY_TEMPLATE, GREY)
HEADINGS = {
    BY_TEXT: "most frequent answer, by question",
    BY_TEMPLATE: "most frequent answer, by template",
    GREY: "same model, grey pictures",
    REDEALT: "same model, evidence dealt anew",
}

_SHORT = {
    BY_TEXT: "by text",
    BY_TEMPLATE: "by form",
    GREY: "grey",
    REDEALT: "re-dealt",
}


@dataclass(frozen=True)
class TaskRow:
    """One line of the table: mean scores over the samples of a task.

    Attributes:
        metric: how they are scored; "mixed" for several ways.
        controls: mean score of each control, empty without a gate.
    """

    task: str
    samples: int
    metric: str
    score: float
    controls: Mapping[str, float]


@dataclass(frozen=True)
class Summary:
    """What one evaluation found.

    Attributes:
        total: over all samples that could be asked.
        tasks: by name.
        broken: samples that could not be asked, by reason; they are in no score.
        looking: where the answers looked, or None where nothing was measured.
        vas: visual attention score, or None where it was not asked for.
        routing: what was read of the pictures and which regions were chosen, or None where nothing was counted.
        verdict: of the gate, or None without one.
        pictures: files, relative to the evaluation's folder.
    """

    name: str
    total: TaskRow
    tasks: tuple[TaskRow, ...]
    broken: Mapping[str, int]
    looking: Looking | None
    vas: Vas | None
    routing: RoutingSummary | None
    verdict: Verdict | None
    pictures: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data; `gate` has the floor that counts beside the verdict's fields."""
        data = dataclasses.asdict(self)
        verdict = data.pop("verdict")
        data["gate"] = None if self.verdict is None else {**verdict, "floor": self.verdict.floor}
        return data

    def dumps(self) -> str:
        """The text of `summary.json`."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"


def mean(values: Iterable[float]) -> float:
    """Mean, 0 of nothing."""
    values = list(values)
    return sum(values) / max(len(values), 1)


def print_summary(summary: Summary, console: Console) -> None:
    """The table of one evaluation, then what the gate says, where the answers looked, and VAS."""
    table = Table(title=f"Evaluation: {summary.name}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("task")
    table.add_column("metric")
    table.add_column("samples", justify="right")
    table.add_column("score", justify="right", style="bold")
    for control in summary.total.controls:
        table.add_column(_SHORT[control], justify="right")
    for row in (*summary.tasks, summary.total):
        if row is summary.total:
            table.add_section()
        controls = [f"{value:.1%}" for value in row.controls.values()]
        table.add_row(row.task, row.metric.split("_")[0], f"{row.samples:,}", f"{row.score:.1%}", *controls)
    console.print(table)
    if summary.total.controls:
        console.print(
            "by text, by form: most frequent training answer to the same question or form\n"
            "grey, re-dealt: the same model on grey pictures, or with the evidence re-dealt",
            style="dim",
        )
    if summary.broken:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.broken.items())
        console.print(f"left out: {reasons}", highlight=False)
    if summary.verdict is not None:
        for finding in summary.verdict.findings:
            console.print(f"gate {finding}", highlight=False, soft_wrap=True)
    if summary.looking is not None:
        console.print(summary.looking.sentence(), highlight=False, soft_wrap=True)
    if summary.vas is not None:
        console.print(summary.vas.sentence(), highlight=False, soft_wrap=True)
    for sentence in [] if summary.routing is None else summary.routing.sentences():
        console.print(sentence, highlight=False, soft_wrap=True)
