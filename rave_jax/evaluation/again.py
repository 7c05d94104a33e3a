"""A subject that is asked again: first passes say where to look, and the answer is read from more views.

The views stand behind the first picture of the conversation, in the same message. What the first passes ask is the
picture and one text; the rest of the conversation is left out of them. A sample without a picture, or with a video, is
asked once, as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from rave_jax.data.images import read_image
from rave_jax.data.sample import Sample, SampleError
from rave_jax.evaluation.routing import Route
from rave_jax.evaluation.subject import Answer, Glances, Reading, Subject
from rave_jax.evaluation.task import Task
from rave_jax.evaluation.vas import VasSums
from rave_jax.look import carve, funnel
from rave_jax.look.blocks import KnockOut
from rave_jax.look.carve import Carve
from rave_jax.look.funnel import VisualFunnel
from rave_jax.look.maps import Look

Again = Carve | VisualFunnel
"""How a sample is asked again."""


class AskedAgain:
    """A subject whose samples get views of their picture, found by passes of the same subject.

    Args:
        subject: who is asked.
        how: which views.
        task: how samples are asked. Its instruction stands behind CARVE's general question too, as in the source, and
            not behind the localisation prompt.
    """

    def __init__(self, subject: Subject, how: Again, task: Task):
        self._subject, self._how, self._task = subject, how, task

    def answer(self, samples: Sequence[Sample]) -> list[Answer | SampleError]:
        """Of the sample with its views."""
        ready = self._with_views(samples)
        asked = iter(self._subject.answer([one for one in ready if isinstance(one, Sample)]))
        return [next(asked) if isinstance(one, Sample) else one for one in ready]

    def look(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Look | None]:
        """Of the sample with its views: where the answer looked in the first picture."""
        return self._subject.look(self._answered(samples), answers)

    def knock_out(self, samples: Sequence[Sample], answers: Sequence[Answer], most: int) -> list[KnockOut | None]:
        """Of the sample with its views: parts of the first picture are hidden, and those cut out of it are not."""
        return self._subject.knock_out(self._answered(samples), answers, most)

    def vas(self, samples: Sequence[Sample]) -> VasSums:
        """Of the samples with their views."""
        return self._subject.vas(self._answered(samples))

    def route(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Route | None]:
        """Of the samples with their views."""
        return self._subject.route(self._answered(samples), answers)

    def per_sample(self, reading: Reading, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Any] | None:
        """Of the samples with their views."""
        return self._subject.per_sample(reading, self._answered(samples), answers)

    def glances(
        self, samples: Sequence[Sample], answers: Sequence[Answer], layers: tuple[int, ...]
    ) -> list[Glances | SampleError | None]:
        """Of the samples with their views."""
        return self._subject.glances(self._answered(samples), answers, layers)

    def _answered(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples that were answered, with their views.

        Raises:
            SampleError: the first passes cannot be asked this time.
        """
        ready = []
        for one in self._with_views(samples):
            if not isinstance(one, Sample):
                raise one
            ready.append(one)
        return ready

    def _with_views(self, samples: Sequence[Sample]) -> list[Sample | SampleError]:
        """Each sample as it is asked at last, or why a pass before could not be asked."""
        ready: list[Sample | SampleError] = [self._task.prompt(sample) for sample in samples]
        if self._changes_nothing:
            return ready
        shown = [n for n, sample in enumerate(samples) if sample.images]
        if not shown:
            return ready
        found = self._carved if isinstance(self._how, Carve) else self._funnelled
        for n, views in zip(shown, found([samples[n] for n in shown]), strict=True):
            one = ready[n]
            if isinstance(views, SampleError):
                ready[n] = views
            elif views is not None and isinstance(one, Sample):
                ready[n] = with_pictures(one, views)
        return ready

    @property
    def _changes_nothing(self) -> bool:
        how = self._how
        return how.fraction == 1 if isinstance(how, Carve) else how.views == ("whole",)

    def _carved(self, samples: Sequence[Sample]) -> list[list[Image.Image] | SampleError | None]:
        """The picture and what is cut out of it; None for a sample that is asked as it is."""
        how = self._how
        assert isinstance(how, Carve)
        questions = [self._task.prompt(sample) for sample in samples]
        general = [self._task.prompt(about_picture(sample, how.general)) for sample in samples]
        # Both in one line, so that slots are full.
        answers = self._subject.answer([*questions, *general])
        good = [n for n in range(len(samples)) if all(isinstance(answers[n + k], Answer) for k in (0, len(samples)))]
        asked = [*[questions[n] for n in good], *[general[n] for n in good]]
        said = [answers[n] for n in good] + [answers[n + len(samples)] for n in good]
        seen = self._subject.glances(asked, [one for one in said if isinstance(one, Answer)], how.layers)
        found: list[list[Image.Image] | SampleError | None] = []
        for n, sample in enumerate(samples):
            wrong = next((one for one in (answers[n], answers[n + len(samples)]) if isinstance(one, SampleError)), None)
            if wrong is not None:
                found.append(wrong)
                continue
            mine, other = seen[good.index(n)], seen[len(good) + good.index(n)]
            if mine is None or other is None or isinstance(mine, SampleError) or isinstance(other, SampleError):
                found.append(mine if isinstance(mine, SampleError) else None)
                continue
            picture = read_image(sample.images[0], sample.called)
            cut = carve.refined(picture, carve.kept(how, carve.fused(how, mine, other, picture.size)))
            found.append(None if cut is None else [picture, cut])
        return found

    def _funnelled(self, samples: Sequence[Sample]) -> list[list[Image.Image] | SampleError | None]:
        """The views; None for a sample that is asked as it is."""
        how = self._how
        assert isinstance(how, VisualFunnel)
        asked = [about_picture(sample, how.where.format(question=sample.question)) for sample in samples]
        seen = self._subject.glances(asked, [Answer("")] * len(asked), how.layers)
        return [
            one
            if one is None or isinstance(one, SampleError)
            else funnel.views(how, one[0, 0], read_image(sample.images[0], sample.called))
            for sample, one in zip(samples, seen, strict=True)
        ]


def about_picture(sample: Sample, text: str) -> Sample:
    """The sample's first picture and one text, as a conversation of its own."""
    content = [{**_first_picture(sample)}, {"type": "text", "text": text}]
    messages = ({"role": "user", "content": content},)
    # The evidence may be in another picture.
    evidence = sample.evidence if sample.evidence_image == 0 else None
    return dataclasses.replace(sample, messages=messages, evidence=evidence, evidence_image=0)


def with_pictures(sample: Sample, pictures: Sequence[Image.Image]) -> Sample:
    """The sample with these pictures in place of its first."""
    first = _first_picture(sample)
    messages = []
    for message in sample.messages:
        content = message["content"]
        if not isinstance(content, str) and any(part is first for part in content):
            made = [{**first, "image": picture} for picture in pictures]
            content = [new for part in content for new in (made if part is first else [part])]
            message = {**message, "content": content}
        messages.append(message)
    # Pictures behind the first have other numbers then.
    evidence = sample.evidence_image + (len(pictures) - 1 if sample.evidence_image else 0)
    return dataclasses.replace(sample, messages=tuple(messages), evidence_image=evidence)


def _first_picture(sample: Sample) -> Any:
    """The part that holds it."""
    parts = (part for m in sample.messages if not isinstance(m["content"], str) for part in m["content"])
    return next(part for part in parts if part["type"] == "image")
