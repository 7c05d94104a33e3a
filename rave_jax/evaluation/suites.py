"""One evaluation: ask, score, compare with the controls, measure what its probes ask for, and write it all down.

In the output folder: `predictions.jsonl` (a line per sample), `summary.json`, and `pictures/` (attention over the
picture, as pictures and as arrays) with `images/` (the pictures alone, where the source gives pixels and no file).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, round_up
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError, Source
from rave_jax.evaluation.again import AskedAgain
from rave_jax.evaluation.asking import AskedByTask
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.grounding import Verdict, judge
from rave_jax.evaluation.intervals import score_interval
from rave_jax.evaluation.probe import Answered
from rave_jax.evaluation.probes import probes_of
from rave_jax.evaluation.records import Record, TrainingAnswers, add_frequent_answers, ask, redealing
from rave_jax.evaluation.sinks import check_depth
from rave_jax.evaluation.subject import Check, ModelSubject, PromptOverBudget, Subject, no_check
from rave_jax.evaluation.summary import FLOORS, HEADINGS, REDEALT, Summary, TaskRow, above_floor, mean
from rave_jax.families.config import TextConfig
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.rows import row_ways

Log = Callable[[str], None]
LINES = 5
"""Samples left out for one reason that are named each."""


class Evaluation:
    """An evaluation of a subject, to be run once or again and again, as with other weights."""

    def __init__(self, config: Eval, source: Source, subject: Subject):
        self.config = config
        self._source = source
        self._subject: Subject = AskedByTask(subject, config.task)
        if config.again is not None:
            self._subject = AskedAgain(subject, config.again, config.task)
        self._training = TrainingAnswers(config.floor)

    def run(self, out: Path | None, log: Log = print, check: Check = no_check, bar: bool = True) -> Summary:
        """Ask and measure. Every process of a job calls it alike; the first one writes.

        Args:
            out: folder to write to, made when missing; None writes nothing.
            log: takes a line for each of the first samples that could not be asked.
            check: called between two pieces of work; what it raises ends the evaluation.
            bar: show progress on a terminal?

        Raises:
            ConfigError: a metric is unknown, or not one sample could be asked.
            SampleError: a sample cannot be asked, and `on_error` is "fail".
        """
        began = time.monotonic()
        config, left = self.config, _LeftOut(self.config, log)
        training = self._training.counted(left.add, check)
        records = list(ask(config, self._source, self._subject, left.add, check, bar and out is not None))
        if not records:
            raise ConfigError(f"evaluation {config.name}: no sample could be asked; left out: {left.in_words()}")
        left.say_budgets()
        if config.floor is not None:
            add_frequent_answers(records, training)
        answered = Answered(self._source, self._subject, records, config.rows, out, check)
        found = {probe.name: probe.measure(answered) for probe in probes_of(config)}
        total = _row("all", records)
        tasks = tuple(_row(name, [r for r in records if r.task == name]) for name in sorted({r.task for r in records}))
        summary = Summary(
            name=config.name,
            total=total,
            tasks=tasks,
            broken=dict(sorted(left.broken.items())),
            floor=above_floor([(r.score, r.controls, r.pictures) for r in records]),
            verdict=_verdict(config, total, tasks),
            findings={name: one.finding for name, one in found.items()},
            pictures=tuple(picture for one in found.values() for picture in one.pictures),
            seconds=round(time.monotonic() - began, 2),
        )
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "predictions.jsonl").write_text("".join(r.line() for r in records), encoding="utf-8")
            (out / "summary.json").write_text(summary.dumps(), encoding="utf-8")
        return summary


def evaluate(config: Eval, model: Vlm, processor: Processor, mesh: Mesh, out: Path, log: Log = print) -> Summary:
    """Examine a model. Every process of a job calls it alike; the first one writes.

    Args:
        config: the evaluation.
        model: with weights on the mesh.
        processor: of the model.
        mesh: the devices.
        out: folder to write to, made when missing.
        log: takes a line for each of the first samples that could not be asked.

    Raises:
        ConfigError: the grounding check is asked of a source that cannot change evidence, a metric is unknown, a layer
            does not exist, or not one sample could be asked.
        SampleError: a sample cannot be asked, and `on_error` is "fail".
    """
    source = open_checked(config, model.config.text)
    first = jax.process_index() == 0
    evaluation = Evaluation(config, source, subject_of(config, model, processor, mesh))
    return evaluation.run(out if first else None, log if first else lambda line: None)


def subject_of(config: Eval, model: Vlm, processor: Processor, mesh: Mesh) -> ModelSubject:
    """The model in the shapes of an evaluation."""
    patches = round_up(config.patches, processor.rules.patch_sizes.window) if model.vision is not None else 0
    rows = round_up(config.rows, row_ways(mesh))
    return ModelSubject(model, processor, mesh, BatchShape(rows, config.tokens, patches), config.max_new_tokens)


def open_checked(config: Eval, text: TextConfig) -> Source:
    """The samples of an evaluation that can be made, as far as that is known without the model's weights.

    Args:
        config: the evaluation.
        text: the decoder of the model.

    Raises:
        ConfigError: data cannot be opened, evidence cannot be changed, a layer does not exist, tokens cannot be hidden,
            or sinks are counted in a model of too few layers.
    """
    if config.sinks:
        check_depth(text.num_layers)
    named = [("layers", layer) for layer in config.layers]
    named += (
        [] if config.again is None else [(f"again ({type(config.again).__name__})", n) for n in config.again.layers]
    )
    for name, layer in named:
        if not 0 <= layer < text.num_layers:
            raise ConfigError(f"{name} has {layer}, but the model's layers are 0 to {text.num_layers - 1}")
        if layer not in text.attention_layers:
            attending = ", ".join(map(str, text.attention_layers))
            raise ConfigError(f"{name} has {layer}, which does not attend; the model's layers that do are {attending}")
    if config.knock_outs and len(text.attention_layers) < text.num_layers:
        raise ConfigError(
            f"{config.name}: knock_outs is {config.knock_outs}, but the model has layers with the gated delta rule, "
            "from whose state nothing can be hidden; set knock_outs 0"
        )
    source = config.data.build()
    redealing(config, source)
    if config.floor is not None and config.floor.train is not None:
        config.floor.train.build()
    return source


def run(config: Eval, source: Source, subject: Subject, out: Path | None, log: Log = print) -> Summary:
    """An evaluation of any subject and source, once; `out` None writes nothing."""
    return Evaluation(config, source, subject).run(out, log)


class _LeftOut:
    """Samples that could not be asked: counted by reason, the first of each named."""

    def __init__(self, config: Eval, log: Log):
        self._fail, self._log = config.on_error == "fail", log
        self.broken: Counter[str] = Counter()
        self._needs: list[PromptOverBudget] = []

    def add(self, error: SampleError) -> None:
        """Count one, or raise its error."""
        if self._fail:
            raise error
        self.broken[error.reason] += 1
        if isinstance(error, PromptOverBudget):
            self._needs.append(error)
        if self.broken[error.reason] <= LINES:
            more = " (more of these are counted only)" if self.broken[error.reason] == LINES else ""
            self._log(f"left out ({error.reason}): {error}{more}")

    def say_budgets(self) -> None:
        """Which budgets would hold all prompts, where some were over them."""
        if self._needs:
            self._log(f"left out: {len(self._needs):,} prompts over budget{_budget(self._needs)}")

    def in_words(self) -> str:
        """How many, and why."""
        left = ", ".join(f"{count:,} {reason}" for reason, count in self.broken.items())
        return f"{left or 'none, the source is empty'}{_budget(self._needs)}"


def _budget(needs: Sequence[PromptOverBudget]) -> str:
    """What would hold them all."""
    if not needs:
        return ""
    return f"; all fit with tokens {max(n.tokens for n in needs)} and patches {max(n.patches for n in needs)}"


def _verdict(config: Eval, total: TaskRow, tasks: Sequence[TaskRow]) -> Verdict | None:
    check = config.grounding
    if check is None:
        return None
    floors = {name: value for name, value in total.controls.items() if name in FLOORS}
    by_task = {row.task: row.score for row in tasks}
    return judge(total.score, floors, total.controls[REDEALT], check.margin, by_task, check.aims, HEADINGS)


def _row(name: str, records: Sequence[Record]) -> TaskRow:
    scores, pictures = [r.score for r in records], [r.pictures for r in records]
    interval = score_interval(scores, pictures)
    return TaskRow(
        task=name,
        samples=len(records),
        pictures=len(set(pictures)),
        metric=records[0].metric if len({r.metric for r in records}) == 1 else "mixed",
        score=mean(scores),
        low=interval.low,
        high=interval.high,
        controls={control: mean(r.controls[control] for r in records) for control in records[0].controls},
    )
