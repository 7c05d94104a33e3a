"""A record of each sample: what the subject answered, its score, and the scores of the controls."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import track

from rave_jax.config import ConfigError
from rave_jax.data.sample import EmptyAnswer, Sample, SampleError, Source
from rave_jax.evaluation.config import Eval, Floor
from rave_jax.evaluation.controls import FrequentAnswers, Redealing, grey
from rave_jax.evaluation.intervals import NO_PICTURE, picture_key
from rave_jax.evaluation.metrics import score
from rave_jax.evaluation.subject import Answer, Check, Subject
from rave_jax.evaluation.summary import BY_TEMPLATE, BY_TEXT, GREY, OF_ALL, REDEALT
from rave_jax.evaluation.task import Task

LeaveOut = Callable[[SampleError], None]
"""Takes what is wrong with a sample that cannot be asked, and counts it or raises it."""


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

    @property
    def said(self) -> Answer:
        """What the subject answered."""
        return Answer(self.prediction, self.tokens)

    def line(self) -> str:
        """The line of the file."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("tokens", "pictures")}
        return json.dumps(fields, ensure_ascii=False) + "\n"


def ask(
    config: Eval, source: Source, subject: Subject, leave_out: LeaveOut, check: Check, bar: bool
) -> Iterator[Record]:
    """A record per sample that could be asked, in order, with the controls that ask the subject again.

    Args:
        config: the evaluation.
        source: its samples.
        subject: asked as its task says.
        leave_out: is told of each sample that cannot be asked.
        check: called before each block of samples.
        bar: show progress on a terminal?
    """
    controls = _Controls(config, source, subject)
    count = min(config.samples, len(source))
    console = Console(stderr=True)
    # More than there are slots, so that a slot that is done early takes the next sample.
    together = 4 * config.rows
    for start in track(
        range(0, count, together),
        f"evaluation {config.name}",
        console=console,
        disable=not (bar and console.is_terminal),
        transient=True,
    ):
        check()
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


def redealing(config: Eval, source: Source) -> Redealing | None:
    """The source, where the grounding check changes its evidence.

    Raises:
        ConfigError: it cannot.
    """
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
        self._redealing = redealing(config, source)

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


class TrainingAnswers:
    """Answers counted over the floor's training samples, the first time that they are asked for."""

    def __init__(self, floor: Floor | None):
        self._floor = floor
        self._counted: FrequentAnswers | None = None
        self._broken: list[SampleError] = []

    def counted(self, leave_out: LeaveOut, check: Check) -> FrequentAnswers | None:
        """The answers; None where the evaluation's own are counted. `leave_out` is told of broken samples each time."""
        floor = self._floor
        if floor is None or floor.train is None:
            return None
        if self._counted is None:
            self._broken.clear()
            self._counted = FrequentAnswers(self._samples(floor.train.build(), floor.train_samples, check))
        for error in self._broken:
            leave_out(error)
        return self._counted

    def _samples(self, source: Source, most: int, check: Check) -> Iterator[Sample]:
        for index in range(min(most, len(source))):
            if index % 64 == 0:  # all processes agree in each check
                check()
            try:
                yield source[index]
            except SampleError as error:
                self._broken.append(error)


def add_frequent_answers(records: Sequence[Record], training: FrequentAnswers | None) -> None:
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
