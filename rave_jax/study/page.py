"""The page of a study: tables, the rule of its decisions and curves, once as Markdown and once as one HTML file."""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rave_jax.evaluation.markdown import table
from rave_jax.evaluation.paired import Interval
from rave_jax.look.curves import Line, Panel, save_panels
from rave_jax.study.config import Study
from rave_jax.study.decision import points
from rave_jax.study.summary import ArmSummary, Band, Family, StartSummary

MARKDOWN, HTML, CURVES = "study.md", "study.html", "curves"
AXES = {"loss": "loss per answer token", "score": "right answers"}
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#212529}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "td,th{border-bottom:1px solid #dee2e6;padding:.25rem .6rem;text-align:left;white-space:nowrap}"
    "img{max-width:100%}h1,h2{line-height:1.2}"
)


@dataclass(frozen=True)
class Heading:
    """A heading of a level from 1 on."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG, by its path from the page's folder."""

    path: str
    alt: str


Block = Heading | Text | Items | Table | Picture


def blocks(study: Study, found: Sequence[StartSummary]) -> list[Block]:
    """Everything that the page says; pictures are those of `draw`."""
    page: list[Block] = [Heading(study.title, 1)]
    page += [Text(study.about)] if study.about else []
    page.append(Heading("How differences decide"))
    page += _rule(study)
    for start in found:
        page += [Heading(f"From {start.name}"), _table(start)]
        page += [Text(_note(family)) for family in start.families]
        page += [_by_task(study, start)] if len(study.tasks) > 1 else []
        curves = _curves(start)
        page += [Text("Curves: the arm in colour, its control in grey, each with its 95 % interval.")] * bool(curves)
        page += [Picture(f"{CURVES}/{start.name}-{name}.png", f"{name} over steps") for name in curves]
    return page


def _rule(study: Study) -> list[Block]:
    rule = study.decision
    return [
        Text(
            "A score is the mean over tasks of the share of held-out questions that greedy answers get exactly right. "
            "Runs of one seed share their start, the order of their samples and the questions, so differences are of "
            "pairs. All intervals are over seeds."
        ),
        Items(
            [
                f"Not decided: arm and control share fewer than {rule.seeds} seeds.",
                f"Not decided: the control's mean score is not from {rule.floor:.0%} to {rule.ceiling:.0%}: it cannot "
                "do the task, or leaves no room to be better.",
                "Not decided: all seeds differ by exactly the same, and not by 0. Scores are shares of few questions, "
                "so this happens, and it says nothing of another seed.",
                "Better, or worse: the corrected interval of the paired difference lies above 0, or below 0.",
                f"The same: it lies within {points(rule.margin)} of 0.",
                "Not decided: all else.",
            ]
        ),
        Text(
            "The bootstrap's interval is shown beside Student's. It assumes no form of the differences, but of few "
            "seeds it is too narrow, and nothing is decided by it."
        ),
    ]


def _note(family: Family) -> str:
    n, lost = family.comparisons, [name for name in family.alone if name not in family.decided]
    if n == 1:
        return f"One arm is compared with `{family.control}`, so nothing is corrected."
    said = (
        f"{n} arms are compared with `{family.control}`. With as many comparisons, some intervals at 95 % miss 0 by "
        f"chance alone; corrected intervals are therefore at {family.level:.2%} each (Bonferroni: 5 % divided by {n}), "
        "so that with a probability of 95 % all of them hold. "
    )
    if not family.alone:
        return said + "Without the correction no arm would be better or worse either."
    names = ", ".join(f"`{name}`" for name in lost)
    effect = f"the correction takes back: {names}" if lost else "the correction takes none of them back"
    return said + f"As the only comparison, {len(family.alone)} would be better or worse; {effect}."


def _table(start: StartSummary) -> Table:
    names = list(dict.fromkeys(name for one in start.arms for name in one.findings))
    header = ["arm", "added parameters", "seeds", "score (95 %)", "against", "difference (95 %)", "bootstrap 95 %"]
    header += ["corrected", "decision", *_called(names), "missing"]
    return Table(header, [_line(one, names) for one in start.arms])


def _called(names: Sequence[str]) -> list[str]:
    """Headers of findings, each `TASK/NAME`; the task is left out where there is one."""
    tasks = {name.rpartition("/")[0] for name in names}
    return [(name if len(tasks) > 1 else name.rpartition("/")[2]).replace("_", " ") for name in names]


def _line(one: ArmSummary, names: Sequence[str]) -> list[str]:
    missing = f"seeds {', '.join(map(str, one.missing))}" if one.missing else ""
    found = one.comparison
    score = "" if one.mean is None else f"{one.mean:.1%}{_around(one.interval, signed=False)}"
    cells = [f"`{one.arm.name}`", "" if one.added is None else f"{one.added:,}", str(len(one.seeds)), score]
    if found is None:
        control = f"`{one.arm.control}`" if one.arm.control else ""
        cells += [control, "", "", "", "not decided: no seed that both have" if control else ""]
    else:
        verdict = found.verdict + (f": {found.why}" if found.why and found.verdict != "same" else "")
        verdict = f"the same {found.why}" if found.verdict == "same" else verdict
        decided = f"**{verdict}**" if found.verdict in ("better", "worse") else verdict
        cells += [
            f"`{one.arm.control}`",
            f"{100 * found.mean:+.1f}{_around(found.student)}",
            _ends(found.bootstrap),
            _ends(found.corrected),
            decided,
        ]
    return [*cells, *[_finding(name, one.findings.get(name)) for name in names], missing]


def _by_task(study: Study, start: StartSummary) -> Table:
    rows = []
    for one in start.arms:
        cells = []
        for task in study.tasks:
            values = [*one.scores[task.name].values()]
            cell = f"{sum(values) / len(values):.1%}" if values else ""
            if task.name in one.by_task:
                mean, interval = one.by_task[task.name]
                cell += f", {100 * mean:+.1f}{_around(interval)}"
            cells.append(cell)
        rows.append([f"`{one.arm.name}`", *cells])
    return Table(["arm: score, difference (95 %, not corrected)", *[task.name for task in study.tasks]], rows)


def _finding(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if name.rpartition("/")[2] in ("entries", "visual") else f"{value:.1%}"


def _ends(interval: Interval, signed: bool = True) -> str:
    """The ends in points; nothing of an interval that holds everything."""
    if math.isinf(interval.low):
        return ""
    sign = "+" if signed else ""
    return f"{100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f}"


def _around(interval: Interval, signed: bool = True) -> str:
    ends = _ends(interval, signed)
    return f" ({ends})" if ends else ""


def _curves(start: StartSummary) -> list[str]:
    return list(dict.fromkeys(name for one in start.arms for name, band in one.curves.items() if band.steps))


def draw(folder: Path, found: Sequence[StartSummary]) -> None:
    """Write the curves of every start: a panel for each arm, with its control behind it."""
    for start in found:
        of = {one.arm.name: one for one in start.arms}
        for name in _curves(start):
            panels = []
            for one in start.arms:
                behind = of.get(one.arm.control)
                lines = [("control", behind)] if behind is not None else []
                told = [_drawn(label, it.curves[name]) for label, it in [*lines, ("arm", one)] if name in it.curves]
                if told:
                    panels.append(Panel(one.arm.name, told))
            save_panels(folder / CURVES / f"{start.name}-{name}.png", panels, AXES.get(name, name))


def _drawn(label: str, band: Band) -> Line:
    pairs = zip(band.mean, band.intervals, strict=True)
    ends = [(mean, mean) if math.isinf(one.low) else (one.low, one.high) for mean, one in pairs]
    return Line(label == "control", band.steps, band.mean, [low for low, _ in ends], [high for _, high in ends])


def markdown(page: Sequence[Block]) -> str:
    """The page as Markdown."""
    lines: list[str] = []
    for block in page:
        match block:
            case Heading(text, level):
                lines += [f"{'#' * level} {text}"]
            case Text(text):
                lines += [text]
            case Items(texts):
                lines += [f"- {text}" for text in texts]
            case Table(header, rows):
                lines += table(header, rows)
            case Picture(path, alt):
                lines += [f"![{alt}]({path})"]
        lines.append("")
    return "\n".join(lines)


def as_html(page: Sequence[Block], folder: Path, title: str) -> str:
    """The page as one HTML file, with its pictures in it."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"]
    parts.append(f"<style>{STYLE}</style>")
    for block in page:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{_inline(text)}</h{level}>")
            case Text(text):
                parts.append(f"<p>{_inline(text)}</p>")
            case Items(texts):
                parts.append("<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in texts) + "</ul>")
            case Table(header, rows):
                head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
                body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
                parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
            case Picture(path, alt):
                data = base64.b64encode((folder / path).read_bytes()).decode()
                parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')
    return "\n".join(parts) + "\n"


def _inline(text: str) -> str:
    """Text with `code` and **bold**."""
    pieces = []
    for n, piece in enumerate(html.escape(text).split("`")):
        bold = "".join(f"<b>{part}</b>" if k % 2 else part for k, part in enumerate(piece.split("**")))
        pieces.append(f"<code>{piece}</code>" if n % 2 else bold)
    return "".join(pieces)


def write(folder: Path, study: Study, found: Sequence[StartSummary]) -> str:
    """Write study.md, study.html and their curves; returns the Markdown.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder, found)
    page = blocks(study, found)
    text = markdown(page)
    for name, whole in ((MARKDOWN, text), (HTML, as_html(page, folder, study.title))):
        part = folder / f".{name}.{os.getpid()}"
        part.write_text(whole, encoding="utf-8")
        os.replace(part, folder / name)
    return text
