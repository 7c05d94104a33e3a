"""One evaluation: ask, score, compare with the controls, look, and write it all down.

In the output folder: `predictions.jsonl` (a line per sample), `summary.json`, and `pictures/` (attention over the
picture, as pictures and as arrays) with `images/` (the pictures alone, where the source gives pixels and no file).
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, round_up
from rave_jax.data.images import read_image
from rave_jax.data.processor import Processor
from rave_jax.data.sample import EmptyAnswer, Sample, SampleError, Source
from rave_jax.evaluation.asking import AskedByTask
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.controls import FrequentAnswers, Redealing, grey
from rave_jax.evaluation.grounding import judge
from rave_jax.evaluation.intervals import NO_PICTURE, picture_key, score_interval
from rave_jax.evaluation.looking import Drawing, Looked, draw, measure, spread, summarise
from rave_jax.evaluation.metrics import score
from rave_jax.evaluation.routing import Hits, Route, hits
from rave_jax.evaluation.routing import summarise as summarise_routes
from rave_jax.evaluation.subject import Answer, ModelSubject, PromptOverBudget, Subject
from rave_jax.evaluation.summary import (
    BY_TEMPLATE,
    BY_TEXT,
    FLOORS,
    GREY,
    HEADINGS,
    OF_ALL,
    REDEALT,
    Summary,
    TaskRow,
    above_floor,
    mean,
)
from rave_jax.evaluation.task import Task
from rave_jax.evaluation.vas import Vas
from rave_jax.look.maps import relative_box
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.rows import row_ways

Log = Callable[[str], None]
LINES = 5
"""Samples left out for one reason that are named each."""


@dataclasses.dataclass
class Record:
    """One line of `predictions.jsonl`.

    Attributes:
        index: place of the sample in its source.
        image: file of the first picture (relative to this folder where it was saved here), the sample's id where
            its pixels were not kept, None without a picture.
        tokens: the prediction's tokens; not written.
        pictures: the same for samples of the same pictures; not written.
        controls: score of each control on the same sample.
    """

    id: str
    index: int
    image: str | None
    question: str
    answer: str
    answers: tuple[str, ...]
    prediction: str
    tokens: tuple[int, ...]
    score: float
    metric: str
    task: str
    template: str
    source: str
    pictures: str
    controls: dict[str, float]

    @property
    def has_pictures(self) -> bool:
        """Is there a picture or a video to look at?"""
        return not self.pictures.startswith(NO_PICTURE)

    def line(self) -> str:
        """The line of the file."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("tokens", "pictures")}
        return json.dumps(fields, ensure_ascii=False) + "\n"


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
        ConfigError: the grounding check is asked of a source that cannot re-deal evidence, a metric is unknown, a layer
            does not exist, or not one sample could be asked.
        SampleError: a sample cannot be asked, and `on_error` is "fail".
    """
    source = open_checked(config, model.config.text.num_layers)
    patches = round_up(config.patches, processor.settings.patch_sizes.window) if model.vision is not None else 0
    rows = round_up(config.rows, row_ways(mesh))
    shape = BatchShape(rows, config.tokens, patches)
    subject = ModelSubject(model, processor, mesh, shape, config.max_new_tokens)
    first = jax.process_index() == 0
    return run(config, source, subject, out if first else None, log if first else lambda line: None)


def open_checked(config: Eval, num_layers: int) -> Source:
    """The samples of an evaluation that can be made, as far as that is known without the model's weights.

    Args:
        config: the evaluation.
        num_layers: decoder layers of the model.

    Raises:
        ConfigError: data cannot be opened, evidence cannot be changed, or a layer does not exist.
    """
    for layer in config.layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(f"layers has {layer}, but the model's layers are 0 to {num_layers - 1}")
    source = config.data.build()
    _redealing(config, source)
    if config.floor is not None and config.floor.train is not None:
        config.floor.train.build()
    return source


def run(config: Eval, source: Source, subject: Subject, out: Path | None, log: Log = print) -> Summary:
    """`evaluate` for any subject and source; `out` None writes nothing."""
    began = time.monotonic()
    subject = AskedByTask(subject, config.task)
    broken: Counter[str] = Counter()
    needs: list[PromptOverBudget] = []

    def leave_out(error: SampleError) -> None:
        if config.on_error == "fail":
            raise error
        broken[error.reason] += 1
        if isinstance(error, PromptOverBudget):
            needs.append(error)
        if broken[error.reason] <= LINES:
            more = " (more of these are counted only)" if broken[error.reason] == LINES else ""
            log(f"left out ({error.reason}): {error}{more}")

    controls = _Controls(config, source, subject)
    training = _training(config, leave_out)
    records = list(_ask(config, source, subject, controls, leave_out, show=out is not None))
    if not records:
        left = ", ".join(f"{count:,} {reason}" for reason, count in broken.items()) or "none, the source is empty"
        raise ConfigError(f"evaluation {config.name}: no sample could be asked; left out: {left}{_budget(needs)}")
    if needs:
        log(f"left out: {len(needs):,} prompts over budget{_budget(needs)}")
    if config.floor is not None:
        _add_frequent_answers(records, training)
    looks, pictures = _look(config, source, subject, records, out)
    vas = _vas(config, source, subject, records)
    routing = summarise_routes(*_route(config, source, subject, records))
    total = _row("all", records)
    tasks = tuple(_row(name, [r for r in records if r.task == name]) for name in sorted({r.task for r in records}))
    verdict = None
    if config.grounding is not None:
        floors = {name: value for name, value in total.controls.items() if name in FLOORS}
        by_task = {row.task: row.score for row in tasks}
        check = config.grounding
        verdict = judge(total.score, floors, total.controls[REDEALT], check.margin, by_task, check.aims, HEADINGS)
    seconds = round(time.monotonic() - began, 2)
    left_out = dict(sorted(broken.items()))
    looking = summarise(looks)
    floor = above_floor([(r.score, r.controls, r.pictures) for r in records])
    summary = Summary(
        config.name, total, tasks, left_out, floor, looking, vas, routing, verdict, tuple(pictures), seconds
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "predictions.jsonl").write_text("".join(r.line() for r in records), encoding="utf-8")
        (out / "summary.json").write_text(summary.dumps(), encoding="utf-8")
    return summary


def _budget(needs: Sequence[PromptOverBudget]) -> str:
    """What would hold them all."""
    if not needs:
        return ""
    return f"; all fit with tokens {max(n.tokens for n in needs)} and patches {max(n.patches for n in needs)}"


def _ask(
    config: Eval,
    source: Source,
    subject: Subject,
    controls: _Controls,
    leave_out: Callable[[SampleError], None],
    show: bool,
) -> Iterator[Record]:
    """A record per sample that could be asked, in order."""
    count = min(config.samples, len(source))
    console = Console(stderr=True)
    # More than there are slots, so that a slot that is done early takes the next sample.
    together = 4 * config.rows
    for start in track(
        range(0, count, together),
        f"evaluation {config.name}",
        console=console,
        disable=not (show and console.is_terminal),
        transient=True,
    ):
        indices, samples = [], []
        for index in range(start, min(start + together, count)):
            try:
                sample = source[index]
                if not sample.answers:
                    raise EmptyAnswer(f"{sample.called}: has no accepted answer to score with")
            except SampleError as error:
                leave_out(error)
                continue
            config.task.metric_of(sample)  # an unknown one is said before the model is asked
            samples.append(sample)
            indices.append(index)
        asked = []
        for index, sample, answer in zip(indices, samples, subject.answer(samples), strict=True):
            if isinstance(answer, SampleError):
                leave_out(answer)
            else:
                asked.append((index, sample, answer))
        records = [_record(config.task, *one) for one in asked]
        controls.add([sample for _, sample, _ in asked], records)
        yield from records


def _redealing(config: Eval, source: Source) -> Redealing | None:
    """The source, where the grounding check changes its evidence."""
    if config.grounding is None:
        return None
    if not isinstance(source, Redealing):
        raise ConfigError(
            f"{config.name}: grounding is set, but data is {type(config.data).__name__}, whose evidence cannot "
            "be changed; use Synthetic, or grounding None"
        )
    return source


class _Controls:
    """Scores of the same model on changed pictures, for records as they come."""

    def __init__(self, config: Eval, source: Source, subject: Subject):
        self._subject, self._task = subject, config.task
        self._grey = config.floor is not None and config.floor.grey
        self._redealing = _redealing(config, source)

    def add(self, samples: Sequence[Sample], records: Sequence[Record]) -> None:
        """Put the scores of the controls into the records of these samples."""
        if self._grey:
            # Without a picture there is nothing to take away: the answer is from the question already.
            seen = [i for i, record in enumerate(records) if record.has_pictures]
            texts = dict(zip(seen, self._answers([grey(samples[i]) for i in seen]), strict=True))
            for i, (sample, record) in enumerate(zip(samples, records, strict=True)):
                text = texts.get(i, record.prediction)
                record.controls[GREY] = self._task.score(record.metric, text, sample.answers)
        if self._redealing is not None:
            dealt = self._answers([self._redealing.redeal(record.index) for record in records])
            for sample, record, text in zip(samples, records, dealt, strict=True):
                record.controls[REDEALT] = self._task.score(record.metric, text, sample.answers)

    def _answers(self, samples: Sequence[Sample]) -> list[str]:
        texts = []
        for answer in self._subject.answer(samples):
            # A control changes pixels alone: where the sample could be asked, it can be asked too.
            if isinstance(answer, SampleError):
                raise answer
            texts.append(answer.text)
        return texts


def _training(config: Eval, leave_out: Callable[[SampleError], None]) -> FrequentAnswers | None:
    """Answers counted over training samples; None where the evaluation's own are counted."""
    if config.floor is None or config.floor.train is None:
        return None
    most, train = config.floor.train_samples, config.floor.train.build()

    def samples() -> Iterator[Sample]:
        for index in range(min(most, len(train))):
            try:
                yield train[index]
            except SampleError as error:
                leave_out(error)

    return FrequentAnswers(samples())


def _add_frequent_answers(records: Sequence[Record], training: FrequentAnswers | None) -> None:
    """Put the scores of the most frequent answers into the records, and drop grey pictures where there are none."""
    frequent = training or FrequentAnswers(records)
    same: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        same[record.pictures].append(record)
    with_pictures = any(record.has_pictures for record in records)
    for record in records:
        without = () if training else same[record.pictures]
        said = {
            BY_TEXT: frequent.by_text(record, without),
            BY_TEMPLATE: frequent.by_template(record, without),
            OF_ALL: frequent.of_all,
        }
        scores = {name: score(record.metric, text, record.answers) for name, text in said.items()}
        record.controls = scores | {n: x for n, x in record.controls.items() if n != GREY or with_pictures}


def _record(task: Task, index: int, sample: Sample, answer: Answer) -> Record:
    metric = task.metric_of(sample)
    image = sample.images[0] if sample.images else None
    return Record(
        id=sample.id,
        index=index,
        image=os.fspath(image) if isinstance(image, (str, os.PathLike)) else None if image is None else sample.id,
        question=sample.question,
        answer=sample.answers[0],
        answers=sample.answers,
        prediction=answer.text,
        tokens=answer.tokens,
        score=task.score(metric, answer.text, sample.answers),
        metric=metric,
        task=sample.task,
        template=sample.template,
        source=sample.source,
        pictures=picture_key(sample, index),
        controls={},
    )


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


def _look(
    config: Eval, source: Source, subject: Subject, records: Sequence[Record], out: Path | None
) -> tuple[list[Looked], list[str]]:
    """Measure where chosen answers looked, and draw the first `config.pictures` of them."""
    chosen = [records[i] for i in spread([r.task for r in records], config.looks)]
    how = Drawing(config.layers, config.per_head, config.picture_format)
    looks: list[Looked] = []
    pictures: list[str] = []
    drawn_so_far = 0
    for start in range(0, len(chosen), config.rows):
        part = chosen[start : start + config.rows]
        samples = [source[record.index] for record in part]
        answers = [Answer(record.prediction, record.tokens) for record in part]
        for record, sample, look in zip(part, samples, subject.look(samples, answers), strict=True):
            if look is None:
                continue
            looked = measure(sample, look, read_image(sample.images[0], sample.called), config.layers)
            looks.append(looked)
            if out is not None and drawn_so_far < config.pictures:
                drawn = draw(out, drawn_so_far, sample, look, looked, how, record.prediction, record.score)
                drawn_so_far += 1
                pictures += drawn.maps
                record.image = drawn.image or record.image
    return looks, pictures


def _vas(config: Eval, source: Source, subject: Subject, records: Sequence[Record]) -> Vas | None:
    """The visual attention score of chosen samples; None where none is asked for."""
    if config.vas == 0:
        return None
    chosen = [records[i].index for i in spread([r.task for r in records], config.vas)]
    total = ratios = 0.0
    for start in range(0, len(chosen), config.rows):
        found = subject.vas([source[index] for index in chosen[start : start + config.rows]])
        total, ratios = total + float(found.total), ratios + float(found.ratios)
    return Vas(len(chosen), round(ratios), total / ratios if ratios else None)


def _route(config: Eval, source: Source, subject: Subject, records: Sequence[Record]) -> tuple[list[Route], list[Hits]]:
    """What chosen samples read of their pictures, and their choices against the evidence where it is known."""
    chosen = [records[i] for i in spread([r.task for r in records], config.routes)]
    samples = [source[record.index] for record in chosen]
    answers = [Answer(record.prediction, record.tokens) for record in chosen]
    routes: list[Route] = []
    found: list[Hits | None] = []
    for sample, route in zip(samples, subject.route(samples, answers), strict=True):
        if route is None:
            continue
        routes.append(route)
        if sample.evidence is not None and route.chosen is not None:
            box = relative_box(sample.evidence, *read_image(sample.images[0], sample.called).size)
            found.append(hits(sample, route, box))
    return routes, [one for one in found if one is not None]
