"""A subject that is asked by a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rave_jax.data.sample import Sample, SampleError
from rave_jax.evaluation.routing import Route
from rave_jax.evaluation.subject import Answer, Glances, Reading, Subject
from rave_jax.evaluation.task import Task
from rave_jax.evaluation.vas import VasSums
from rave_jax.look.blocks import KnockOut
from rave_jax.look.maps import Look


class AskedByTask:
    """A subject that is given every sample as a task asks it. Its answers are all that the subject says."""

    def __init__(self, subject: Subject, task: Task):
        self._subject, self._task = subject, task

    def answer(self, samples: Sequence[Sample]) -> list[Answer | SampleError]:
        """As the subject, asked by the task."""
        return self._subject.answer(self._asked(samples))

    def look(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Look | None]:
        """As the subject, asked by the task."""
        return self._subject.look(self._asked(samples), answers)

    def knock_out(self, samples: Sequence[Sample], answers: Sequence[Answer], most: int) -> list[KnockOut | None]:
        """As the subject, asked by the task."""
        return self._subject.knock_out(self._asked(samples), answers, most)

    def vas(self, samples: Sequence[Sample]) -> VasSums:
        """As the subject, asked by the task."""
        return self._subject.vas(self._asked(samples))

    def route(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Route | None]:
        """As the subject, asked by the task."""
        return self._subject.route(self._asked(samples), answers)

    def per_sample(self, reading: Reading, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Any] | None:
        """As the subject, asked by the task."""
        return self._subject.per_sample(reading, self._asked(samples), answers)

    def glances(
        self, samples: Sequence[Sample], answers: Sequence[Answer], layers: tuple[int, ...]
    ) -> list[Glances | SampleError | None]:
        """As the subject, asked by the task."""
        return self._subject.glances(self._asked(samples), answers, layers)

    def _asked(self, samples: Sequence[Sample]) -> list[Sample]:
        return [self._task.prompt(sample) for sample in samples]
