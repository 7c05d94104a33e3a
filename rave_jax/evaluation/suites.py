"""One evaluation: ask, score, compare with the controls, look, and write it all down.

In the output folder: `predictions.jsonl` (a line per sample), `summary.json`, and `pictures/` (attention over the
picture) with `images/` (the pictures alone, where the source gives pixels and no file).
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
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
from rave_jax.data.sample import Sample, SampleError, Source
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.controls import FrequentAnswers, Redealing, grey
from rave_jax.evaluation.gate import judge
from rave_jax.evaluation.looking import Looked, draw, measure, spread, summarise
from rave_jax.evaluation.metrics import score
from rave_jax.evaluation.routing import Hits, Route, hits
from rave_jax.evaluation.routing import summarise as summarise_routes
from rave_jax.evaluation.subject import Answer, ModelSubject, Subject
from rave_jax.evaluation.summary import BY_TEMPLATE, BY_TEXT, FLOORS, GREY, REDEALT, Summary, TaskRow, mean
from rave_jax.evaluation.vas import Vas
from rave_jax.look.maps import relative_box
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.rows import row_ways

Log = Callable[[str], None]


@dataclasses.dataclass
class Record:
    """One line of `predictions.jsonl`.

    Attributes:
        index: place of the sample in its source.
        image: file of the first picture (relative to this folder where it was saved here), the sample's id where
            its pixels were not kept, None without a picture.
        tokens: the prediction's tokens; not written.
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
    controls: dict[str, float]

    def line(self) -> str:
        """The line of the file."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "tokens"}
        return json.dumps(fields, ensure_ascii=False) + "\n"


def evaluate(config: Eval, model: Vlm, processor: Processor, mesh: Mesh, out: Path, log: Log = print) -> Summary:
    """Examine a model. Every process of a job calls it alike; the first one writes.

    Args:
        config: the evaluation.
        model: with weights on the mesh.
        processor: of the model.
        mesh: the devices.
        out: folder to write to, made when missing.
        log: takes one line per sample that could not be asked.

    Raises:
        ConfigError: the gate is asked of a source that cannot re-deal evidence, a metric is unknown, a layer does
            not exist, or not one sample could be asked.
        SampleError: a sample cannot be asked, and `on_error` is "fail".
    """
    for layer in config.layers:
        if not 0 <= layer < model.config.text.num_layers:
            raise ConfigError(f"layers has {layer}, but the model's layers are 0 to {model.config.text.num_layers - 1}")
    patches = round_up(config.patches, processor.settings.window_patches) if model.vision is not None else 0
    rows = round_up(config.rows, row_ways(mesh))
    shape = BatchShape(rows, config.tokens, patches)
    subject = ModelSubject(model, processor, mesh, shape, config.max_new_tokens)
    first = jax.process_index() == 0
    return run(config, config.data.build(), subject, out if first else None, log if first else lambda line: None)


def run(config: Eval, source: Source, subject: Subject, out: Path | None, log: Log = print) -> Summary:
    """`evaluate` for any subject and source; `out` None writes nothing."""
    began = time.monotonic()
    broken: Counter[str] = Counter()

    def leave_out(error: SampleError) -> None:
        if config.on_error == "fail":
            raise error
        broken[error.reason] += 1
        log(f"left out ({error.reason}): {error}")

    controls = None if config.gate is None else _Controls(config, source, subject, leave_out)
    records = list(_ask(config, source, subject, controls, leave_out, show=out is not None))
    if not records:
        raise ConfigError(f"evaluation {config.name}: no sample could be asked; left out: {dict(broken) or 'none'}")
    looks, pictures = _look(config, source, subject, records, out)
    vas = _vas(config, source, subject, records)
    routing = summarise_routes(*_route(config, source, subject, records))
    total = _row("all", records)
    tasks = tuple(_row(name, [r for r in records if r.task == name]) for name in sorted({r.task for r in records}))
    verdict = None
    if config.gate is not None:
        floors = {name: total.controls[name] for name in FLOORS}
        by_task = {row.task: row.score for row in tasks}
        verdict = judge(total.score, floors, total.controls[REDEALT], config.gate.margin, by_task, config.gate.aims)
    seconds = round(time.monotonic() - began, 2)
    left_out = dict(sorted(broken.items()))
    looking = summarise(looks)
    summary = Summary(config.name, total, tasks, left_out, looking, vas, routing, verdict, tuple(pictures), seconds)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "predictions.jsonl").write_text("".join(r.line() for r in records), encoding="utf-8")
        (out / "summary.json").write_text(summary.dumps(), encoding="utf-8")
    return summary


def _ask(
    config: Eval,
    source: Source,
    subject: Subject,
    controls: _Controls | None,
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
                samples.append(source[index])
                indices.append(index)
            except SampleError as error:
                leave_out(error)
        asked = []
        for index, sample, answer in zip(indices, samples, subject.answer(samples), strict=True):
            if isinstance(answer, SampleError):
                leave_out(answer)
            else:
                asked.append((index, sample, answer))
        scores = [{}] * len(asked) if controls is None else controls.scores([i for i, _, _ in asked])
        for (index, sample, answer), control in zip(asked, scores, strict=True):
            yield _record(index, sample, answer, control)


class _Controls:
    """Scores of the controls on samples of the source, by index."""

    def __init__(self, config: Eval, source: Source, subject: Subject, leave_out: Callable[[SampleError], None]):
        assert config.gate is not None
        if not isinstance(source, Redealing):
            raise ConfigError(
                f"{config.name}: gate is set, but data is {type(config.data).__name__}, whose evidence cannot be "
                "dealt anew; use Synthetic, or gate None"
            )
        self._source: Redealing = source
        self._subject = subject
        train = config.gate.train.build()

        def training() -> Iterator[Sample]:
            for index in range(min(config.gate.train_samples if config.gate else 0, len(train))):
                try:
                    yield train[index]
                except SampleError as error:
                    leave_out(error)

        self._frequent = FrequentAnswers(training())

    def scores(self, indices: Sequence[int]) -> list[dict[str, float]]:
        """The score of every control on each sample."""
        samples = [self._source[index] for index in indices]
        unseen = self._answers([grey(sample) for sample in samples])
        dealt = self._answers([self._source.redeal(index) for index in indices])
        scores = []
        for sample, without, other in zip(samples, unseen, dealt, strict=True):
            said = {
                BY_TEXT: self._frequent.by_text(sample),
                BY_TEMPLATE: self._frequent.by_template(sample),
                GREY: without,
                REDEALT: other,
            }
            scores.append({name: score(sample.metric, text, sample.answers) for name, text in said.items()})
        return scores

    def _answers(self, samples: Sequence[Sample]) -> list[str]:
        texts = []
        for answer in self._subject.answer(samples):
            # A control changes pixels alone: where the sample could be asked, it can be asked too.
            if isinstance(answer, SampleError):
                raise answer
            texts.append(answer.text)
        return texts


def _record(index: int, sample: Sample, answer: Answer, controls: dict[str, float]) -> Record:
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
        score=score(sample.metric, answer.text, sample.answers),
        metric=sample.metric,
        task=sample.task,
        template=sample.template,
        source=sample.source,
        controls=controls,
    )


def _row(name: str, records: Sequence[Record]) -> TaskRow:
    names = records[0].controls
    return TaskRow(
        task=name,
        samples=len(records),
        metric=records[0].metric if len({r.metric for r in records}) == 1 else "mixed",
        score=mean(r.score for r in records),
        controls={control: mean(r.controls[control] for r in records) for control in names},
    )


def _look(
    config: Eval, source: Source, subject: Subject, records: Sequence[Record], out: Path | None
) -> tuple[list[Looked], list[str]]:
    """Measure where chosen answers looked, and draw the first `config.pictures` of them."""
    chosen = [records[i] for i in spread([r.task for r in records], config.looks)]
    looks: list[Looked] = []
    pictures: list[str] = []
    for start in range(0, len(chosen), config.rows):
        part = chosen[start : start + config.rows]
        samples = [source[record.index] for record in part]
        answers = [Answer(record.prediction, record.tokens) for record in part]
        for record, sample, look in zip(part, samples, subject.look(samples, answers), strict=True):
            if look is None:
                continue
            looked = measure(sample, look, read_image(sample.images[0], sample.id), config.layers)
            looks.append(looked)
            if out is not None and len(pictures) < config.pictures:
                drawn = draw(out, len(pictures), sample, look, looked, config.layers, record.prediction, record.score)
                pictures.append(drawn.overlay)
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
            box = relative_box(sample.evidence, *read_image(sample.images[0], sample.id).size)
            found.append(hits(sample, route, box))
    return routes, [one for one in found if one is not None]
