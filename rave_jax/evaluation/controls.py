"""What a score must be compared with: answering without looking, and looking at other evidence.

- The question-only floor is the larger of two: the most frequent training answer to the same question text or
  template, and the same model shown grey pictures.
- The re-dealt score asks the same questions of pictures whose evidence was changed, against the old answers: a
  model that reads the evidence is wrong there, one that guesses does not notice.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from rave_jax.data.images import image_size
from rave_jax.data.sample import Message, Sample
from rave_jax.evaluation.metrics import normalise

GREY = (128, 128, 128)


@runtime_checkable
class Redealing(Protocol):
    """A source that can deal evidence anew: same question and answers, another picture."""

    def __getitem__(self, index: int) -> Sample: ...

    def redeal(self, index: int) -> Sample: ...


class FrequentAnswers:
    """The most frequent answer among training samples, by question text and by template.

    Ties go to the answer that sorts first. A text that training never showed is answered by its template,
    an unknown template by the most frequent answer of all.
    """

    def __init__(self, train: Iterable[Sample]):
        texts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        templates: defaultdict[str, Counter[str]] = defaultdict(Counter)
        everything: Counter[str] = Counter()
        for sample in train:
            answer = sample.answers[0]
            texts[normalise(sample.question)][answer] += 1
            templates[sample.template][answer] += 1
            everything[answer] += 1
        self._texts = {text: _most_frequent(answers) for text, answers in texts.items()}
        self._templates = {template: _most_frequent(answers) for template, answers in templates.items()}
        self._any = _most_frequent(everything)

    def by_template(self, sample: Sample) -> str:
        """The answer that was most frequent for this sample's template."""
        return self._templates.get(sample.template, self._any)

    def by_text(self, sample: Sample) -> str:
        """The answer that was most frequent for this sample's question text."""
        return self._texts.get(normalise(sample.question), self.by_template(sample))


def _most_frequent(answers: Counter[str]) -> str:
    return min(answers, key=lambda answer: (-answers[answer], answer), default="")


def grey(sample: Sample) -> Sample:
    """The sample with every picture and video frame replaced by even grey of its size.

    Raises:
        ImageError: a picture whose size cannot be read.
    """

    def blank(source: Any, name: str) -> Image.Image:
        height, width = image_size(source, name)
        return Image.new("RGB", (width, height), GREY)

    return dataclasses.replace(sample, messages=tuple(_with_pictures(m, blank) for m in sample.messages))


def _with_pictures(message: Message, change: Callable[[Any, str], Any]) -> Message:
    if isinstance(message["content"], str):
        return message

    def changed(part: Mapping[str, Any]) -> Mapping[str, Any]:
        name = part.get("name", "")
        if part["type"] == "image":
            return {**part, "image": change(part["image"], name)}
        if part["type"] == "video":
            return {**part, "video": [change(frame, name) for frame in part["video"]]}
        return part

    return {**message, "content": [changed(part) for part in message["content"]]}
