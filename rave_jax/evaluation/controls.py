"""What a score must be compared with: answering without looking, and looking at other evidence.

- The question-only floor is the largest of these: the most frequent answer to the same question text, to the same
  template, or of all, and the same model shown grey pictures. Answers are counted over training samples or, without
  them, over the samples of the evaluation: by text and by template over those of other pictures, so that no question
  is answered from its own answer; of all over every one, which is the best that one answer to everything can reach.
- The score with changed evidence (`redealt`) asks the same questions about pictures whose evidence was changed, and
  expects the original answers. A model that reads the evidence is then wrong; a model that guesses does not notice.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from rave_jax.data.images import image_size
from rave_jax.data.sample import Message, Sample
from rave_jax.data.video import grey_frames
from rave_jax.evaluation.metrics import normalise

GREY = (128, 128, 128)


@runtime_checkable
class Redealing(Protocol):
    """A source that can change the evidence: same question and answers, another picture."""

    def __getitem__(self, index: int) -> Sample: ...

    def redeal(self, index: int) -> Sample: ...


class Told(Protocol):
    """What is known of a sample without its picture."""

    @property
    def question(self) -> str: ...

    @property
    def template(self) -> str: ...

    @property
    def answers(self) -> Sequence[str]: ...


class FrequentAnswers:
    """The most frequent answer among samples, by question text, by template, and of all.

    Ties go to the answer that sorts first. A text that no sample has is answered by its template, an unknown template
    by the most frequent answer of all.
    """

    def __init__(self, samples: Iterable[Told]):
        texts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        templates: defaultdict[str, Counter[str]] = defaultdict(Counter)
        everything: Counter[str] = Counter()
        for sample in samples:
            answer = sample.answers[0] if sample.answers else ""
            texts[normalise(sample.question)][answer] += 1
            templates[sample.template][answer] += 1
            everything[answer] += 1
        self._texts = {text: _Ranked(answers) for text, answers in texts.items()}
        self._templates = {template: _Ranked(answers) for template, answers in templates.items()}
        self._all = _Ranked(everything)

    @property
    def of_all(self) -> str:
        """The answer that was most frequent of all."""
        return self._all.best(Counter()) or ""

    def by_template(self, sample: Told, without: Sequence[Told] = ()) -> str:
        """The answer that was most frequent for this sample's template.

        Args:
            sample: the question.
            without: samples that were counted and must not count, as those of the same picture.
        """
        left = _answers(s for s in without if s.template == sample.template)
        ranked = self._templates.get(sample.template)
        found = None if ranked is None else ranked.best(left)
        return (self._all.best(_answers(without)) or "") if found is None else found

    def by_text(self, sample: Told, without: Sequence[Told] = ()) -> str:
        """The answer that was most frequent for this sample's question text; arguments as in `by_template`."""
        text = normalise(sample.question)
        ranked = self._texts.get(text)
        found = None if ranked is None else ranked.best(_answers(s for s in without if normalise(s.question) == text))
        return self.by_template(sample, without) if found is None else found


class _Ranked:
    """Answers by how often they were given, ties by their text."""

    def __init__(self, counts: Counter[str]):
        self._counts = counts
        self._order = sorted(counts, key=lambda answer: (-counts[answer], answer))

    def best(self, without: Counter[str]) -> str | None:
        """The most frequent answer when some are taken away; None when none is left."""
        found: list[tuple[int, str]] = []
        for answer in self._order:
            found.append((without[answer] - self._counts[answer], answer))
            if answer not in without:  # nothing behind it can be more frequent
                break
        least, answer = min(found, default=(0, ""))
        return answer if least < 0 else None


def _answers(samples: Iterable[Told]) -> Counter[str]:
    return Counter(sample.answers[0] if sample.answers else "" for sample in samples)


def grey(sample: Sample) -> Sample:
    """The sample with every picture and video frame replaced by even grey of its size.

    Raises:
        ImageError: a picture whose size cannot be read.
    """

    return dataclasses.replace(sample, messages=tuple(map(_grey_message, sample.messages)))


def _grey_message(message: Message) -> Message:
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_grey_part(part) for part in message["content"]]}


def _grey_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    name = part.get("name", "")
    if part["type"] == "image":
        height, width = image_size(part["image"], name)
        return {**part, "image": Image.new("RGB", (width, height), GREY)}
    if part["type"] == "video":
        frames, fps = grey_frames(part["video"], part.get("fps"), GREY, name)
        return {**part, "video": frames} | ({} if fps is None else {"fps": fps})
    return part
