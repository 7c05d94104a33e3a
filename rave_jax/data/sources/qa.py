"""Questions and answers in a JSON Lines file: `{"id", "image", "question", "answers": [...], "metric"}` per line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rave_jax.data.sample import Message, Sample, SampleError
from rave_jax.data.sources.records import open_records, visual_parts


@dataclass(frozen=True)
class QaJsonl:
    """Questions about pictures, with the answers that count and how they are scored."""

    path: str = ""
    """The file, JSON Lines (or a JSON list where it ends in .json)."""
    image_dir: str = ""
    """Folder that image names are relative to; empty for the file's own folder."""
    suffix: str = ""
    """Text put behind every question, such as a request for a short answer."""
    metric: str = "exact_match"
    """How records without a metric of their own are scored."""
    name: str = ""
    """Name in tables; empty for the name of the file's folder."""

    def build(self) -> QaSource:
        """The source.

        Raises:
            ConfigError: no such file, or one that holds no records.
        """
        return QaSource(self)


class QaSource:
    """Samples of a question file, by record number."""

    def __init__(self, config: QaJsonl):
        self._config = config
        self._records = open_records(config.path)
        self._folder = Path(config.image_dir) if config.image_dir else self._records.path.parent
        self.name = config.name or self._records.path.resolve().parent.name

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        where = self._records.where(index)
        if not isinstance(record.get("question"), str):
            raise SampleError(f"{where}: question is {record.get('question')!r}, expected a text")
        question = record["question"] + self._config.suffix
        answers = _answers(record, where)
        try:
            visuals = visual_parts(record, self._folder)
        except SampleError as error:
            raise SampleError(f"{where}: {error}") from error
        content = [*visuals, {"type": "text", "text": question}]
        messages: tuple[Message, ...] = ({"role": "user", "content": content},)
        if answers:
            messages += ({"role": "assistant", "content": answers[0]},)
        box = record.get("evidence")
        return Sample(
            id=str(record.get("id", index)),
            messages=messages,
            answers=answers,
            metric=record.get("metric", self._config.metric),
            source=self.name,
            evidence=(float(box[0]), float(box[1]), float(box[2]), float(box[3])) if box else None,
            template=record["question"],
            task=self.name,
        )


def _answers(record: dict[str, Any], where: str) -> tuple[str, ...]:
    answers = record.get("answers", record.get("answer", ()))
    if isinstance(answers, str):
        return (answers,)
    if not isinstance(answers, (list, tuple)):
        raise SampleError(f"{where}: answers is {answers!r}, expected a list of texts")
    return tuple(str(answer) for answer in answers)
