"""Questions and answers in a JSON Lines file: `{"id", "image", "question", "answers": [...], "metric"}` per line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rave_jax.config import require, shown
from rave_jax.data.places import SCHEMES, place
from rave_jax.data.sample import METRICS, Message, Sample, SampleError
from rave_jax.data.sources.conversation import PLACEHOLDER, conversation
from rave_jax.data.sources.filters import FieldIs
from rave_jax.data.sources.keys import is_empty, take
from rave_jax.data.sources.records import RecordSource, open_records
from rave_jax.data.sources.turns import SYSTEM, Turn, answer_texts, is_number, record_id
from rave_jax.data.sources.visuals import IMAGE_KEYS, VIDEO_KEYS, visual_parts

ANSWERS = ("answers", "answer")
KEYS: tuple[str, ...] = ("id", "question", *ANSWERS, "metric", "evidence", *IMAGE_KEYS, *VIDEO_KEYS, *SYSTEM)
"""Every key of a record that is read."""


@dataclass(frozen=True)
class QaJsonl:
    """Questions about pictures, with the answers that count and how they are scored."""

    path: str = ""
    """The file: JSON Lines, or a JSON list if its name ends in .json. It may be a URL, gs://... or s3://..."""
    image_dir: str = ""
    """Folder that picture paths are relative to; empty for the file's own folder."""
    suffix: str = ""
    """Text added after every question, such as a request for a short answer."""
    metric: str = "exact_match"
    """How predictions are scored where a record names no metric: exact_match, relaxed_accuracy or anls."""
    name: str = ""
    """Name in tables; empty for the name of the file's folder."""
    ignored: tuple[str, ...] = ()
    """Keys of records that are left out: nothing is learned from them."""
    where: tuple[FieldIs, ...] = ()
    """Which records are used; all of these hold. Empty for every record."""

    url_schemes: ClassVar = tuple(SCHEMES)

    def __post_init__(self) -> None:
        require(self.metric in METRICS, "metric", self.metric, f"one of {', '.join(METRICS)}")

    def build(self) -> QaSource:
        """The source.

        Raises:
            ConfigError: no such file, or one that holds no records.
        """
        return QaSource(self)


class QaSource(RecordSource):
    """Samples of a question file, by record number."""

    def __init__(self, config: QaJsonl):
        records = open_records(config.path)
        super().__init__(config, records, place(config.image_dir) if config.image_dir else records.path.parent)
        self._metric, self._suffix = config.metric, config.suffix
        self.name = config.name or records.path.resolve().parent.name

    def sample(self, record: dict[str, Any], index: int, where: str) -> Sample:
        """The question of a record."""
        return question_of(record, index, where, self, self._metric, self._suffix)


def question_of(
    record: dict[str, Any], index: int, where: str, source: RecordSource, metric: str, suffix: str
) -> Sample:
    """The question of a record with its answers.

    Raises:
        SampleError: the record cannot be used.
    """
    check_question(record)
    record = take(record, KEYS, source.unread(KEYS), "the record")
    messages, answers = question(record, visual_parts(record, source.folder, where), suffix)
    return Sample(
        id=record_id(record, index),
        messages=messages,
        answers=answers,
        metric=_metric(record.get("metric", metric)),
        source=source.name,
        evidence=_box(record.get("evidence")),
        template=record["question"],
        task=source.name,
    )


def check_question(record: Mapping[str, Any]) -> None:
    """Raise SampleError, saying what the record holds, unless it has a question."""
    if record.get("question") is None:
        raise SampleError(
            f"no question: the record has the keys {', '.join(map(shown, record)) or 'none'}; expected 'question' and "
            "'answers' (LlavaJson reads conversations)"
        )


def question(
    record: Mapping[str, Any], visuals: list[Message], suffix: str = ""
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Messages and accepted answers of a question with its pictures, the first answer being the one that is trained.

    Pictures go where the question has `<image>` or `<video>`, and else in front of it.

    Raises:
        SampleError: no question, other placeholders than it has pictures, or answers that are none.
    """
    check_question(record)
    if not isinstance(record["question"], str):
        raise SampleError(f"question is {shown(record['question'])}, expected a text")
    answers = _answers(record)
    asked = record["question"] + suffix
    if visuals and PLACEHOLDER.search(asked):
        messages = list(conversation([Turn("user", asked)], visuals, Path()))
    else:
        messages = [{"role": "user", "content": [*visuals, {"type": "text", "text": asked}]}]
    for key in SYSTEM:
        if not is_empty(system := record.get(key)):
            if not isinstance(system, str):
                raise SampleError(f"{key} is {shown(system)}, expected a text")
            messages.insert(0, {"role": "system", "content": system})
    if answers:
        messages.append({"role": "assistant", "content": answers[0]})
    return tuple(messages), answers


def _answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    many, one = (answer_texts(record.get(key), key) for key in ANSWERS)
    if many and not set(one) <= set(many):
        raise SampleError("'answer' is not one of 'answers': keep only one of the two keys")
    return many or one


def _metric(name: Any) -> str:
    if not isinstance(name, str) or name not in METRICS:
        known = ", ".join(METRICS)
        raise SampleError(
            f"metric is {shown(name)}, expected one of {known}; the source's own is used where `ignored` names 'metric'"
        )
    return name


def _box(value: Any) -> tuple[float, float, float, float] | None:
    """The box of the answer's evidence, pixels of the first picture."""
    if is_empty(value):
        return None
    if not isinstance(value, list) or len(value) != 4 or not all(map(is_number, value)):
        raise SampleError(f"evidence is {shown(value)}, expected four numbers x1, y1, x2, y2")
    left, top, right, bottom = map(float, value)
    if left > right or top > bottom:
        raise SampleError(f"evidence is {shown(value)}, expected x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    return left, top, right, bottom
