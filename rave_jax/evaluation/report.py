"""The page about a run: `report.md` from the files that training and evaluation left beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rave_jax.evaluation.config import Report
from rave_jax.evaluation.markdown import table
from rave_jax.evaluation.probes import PROBES
from rave_jax.evaluation.summary import HEADINGS, AboveFloor
from rave_jax.look.curves import save_loss_curve
from rave_jax.observe.metrics import read_jsonl

EVALUATION = "evaluation"
_LONGEST = 160


def write_report(config: Report, run: Path) -> Path:
    """Write `report.md`, and `loss.png` where the run has metrics.

    Args:
        config: the page.
        run: the run directory; what it does not hold is left out of the page.

    Returns:
        the page's path.
    """
    page = [f"# {config.title}", ""]
    page += _config(run / "config.json")
    page += _training(run, config.smoothing)
    for file in sorted(run.glob(f"{EVALUATION}/*/summary.json")):
        page += _evaluation(json.loads(file.read_text(encoding="utf-8")), file.parent.relative_to(run))
        page += _between_steps(run, file.parent)
    path = run / "report.md"
    path.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    return path


def _config(path: Path) -> list[str]:
    if not path.is_file():
        return []
    config = json.loads(path.read_text(encoding="utf-8"))
    rows = [[f"`{name}`", f"`{_short(value)}`"] for name, value in config.items() if name not in ("type", "final")]
    return ["## Config", "", *table(["field", "value"], rows), "", f"All steps: [{path.name}]({path.name}).", ""]


def _short(value: Any) -> str:
    """A config value in one line: class names in front of their fields, long ones cut."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            fields = ", ".join(f"{k}={text(v)}" for k, v in value.items() if k != "type")
            return f"{value.get('type', '')}({fields})"
        if isinstance(value, list):
            return "[" + ", ".join(map(text, value)) + "]"
        return json.dumps(value, ensure_ascii=False)

    line = text(value)
    return (line if len(line) <= _LONGEST else line[: _LONGEST - 4] + " ...").replace("|", "/").replace("`", "'")


def _training(run: Path, smoothing: int) -> list[str]:
    file = run / "metrics.jsonl"
    rows = [row for row in read_jsonl(file) if row.get("loss") is not None] if file.is_file() else []
    if not rows:
        return []
    steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    # Metrics are written every few steps; smoothing is said in steps.
    apart = max((steps[-1] - steps[0]) / max(len(steps) - 1, 1), 1.0)
    save_loss_curve(run / "loss.png", steps, losses, max(round(smoothing / apart), 1))
    return [
        "## Training",
        "",
        f"{steps[-1]:,} steps; loss {losses[0]:.3f} at step {steps[0]:,}, {losses[-1]:.3f} at step {steps[-1]:,}.",
        "",
        "![loss](loss.png)",
        "",
    ]


def _evaluation(summary: Mapping[str, Any], folder: Path) -> list[str]:
    total = summary["total"]
    names = list(total["controls"])
    # Intervals, floors and findings of some probes are not in the summaries that older versions wrote.
    intervals = "low" in total
    header = ["task", "metric", "samples", "score", *["95 %"] * intervals, *(HEADINGS[name] for name in names)]
    rows = []
    for row in (*summary["tasks"], total):
        mark = "**" if row["task"] == "all" else ""
        cells = [row["task"], row["metric"], f"{row['samples']:,}", f"{row['score']:.1%}"]
        cells += [f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"] if intervals else []
        cells += [f"{row['controls'][name]:.1%}" for name in names]
        rows.append([f"{mark}{cell}{mark}" for cell in cells])
    page = [f"## Evaluation: {summary['name']}", "", *table(header, rows, left=2), ""]
    if summary.get("floor"):
        sentence = AboveFloor(**summary["floor"]).sentence()
        page += [f"{sentence[0].upper()}{sentence[1:]}.", ""]
    if intervals:
        page += [f"The 95 % intervals are over {total['pictures']:,} pictures.", ""]
    if summary["broken"]:
        page += ["Left out: " + ", ".join(f"{n:,} {reason}" for reason, n in summary["broken"].items()) + ".", ""]
    page += [f"Every prediction: [predictions.jsonl]({folder}/predictions.jsonl).", ""]
    page += _grounding(summary.get("grounding", summary.get("gate")))
    for probe in PROBES:
        finding = summary.get(probe.name)
        page += [] if finding is None else probe.section(finding)
    if summary["pictures"]:
        page += [
            "Colours are multiples of uniform attention over the picture, or of a cost spread evenly over it, on one "
            "scale in all pictures; the numbers are in the `.npz` beside each.",
            "",
        ]
    for picture in summary["pictures"]:
        of = "what hiding parts costs one answer" if "_knock_out." in picture else "attention of one answer"
        page += [f"{'' if picture.endswith('.pdf') else '!'}[{of}]({folder}/{picture})", ""]
    return page


def _between_steps(run: Path, folder: Path) -> list[str]:
    """A row for each step of training after which the evaluation was run; the metrics say which these are."""
    file, name = run / "metrics.jsonl", f"eval/{folder.name}"
    logged = read_jsonl(file) if file.is_file() else []
    found = {int(row["step"]): row for row in logged if row.get(f"{name}/score") is not None}
    if not found:
        return []
    rows = []
    for step, row in sorted(found.items()):
        summary = folder / "steps" / str(step) / "summary.json"
        total = json.loads(summary.read_text(encoding="utf-8"))["total"] if summary.is_file() else None
        interval = "" if total is None else f"{100 * total['low']:.1f} to {100 * total['high']:.1f}"
        floor = row.get(f"{name}/floor")
        rows.append([f"{step:,}", f"{row[f'{name}/score']:.1%}", interval, "" if floor is None else f"{floor:.1%}"])
    header = ["after step", "score", "95 %", "question-only floor"]
    return ["### During training", "", *table(header, rows, left=0), ""]


def _grounding(check: Mapping[str, Any] | None) -> list[str]:
    if check is None:
        return []
    floors = "; ".join(f"{HEADINGS[name]}: {value:.1%}" for name, value in check["floors"].items())
    return [
        f"### The grounding check {'holds' if check['holds'] else 'does not hold'}",
        "",
        *(f"- {finding}" for finding in check["findings"]),
        "",
        f"The question-only floor, {check['floor']:.1%}, is the largest of: {floors}.",
        "",
    ]
