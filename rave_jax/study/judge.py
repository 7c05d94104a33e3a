"""What a trained model is worth: its answers to held-out samples, and what its queries read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, round_up
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example, Sample, SampleError
from rave_jax.evaluation.accounting import account
from rave_jax.evaluation.calibration import asked_at
from rave_jax.evaluation.forced import ForcedAnswers, conversation
from rave_jax.evaluation.routing import summary_of
from rave_jax.evaluation.subject import Answer, ModelSubject
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.rows import row_ways
from rave_jax.study.config import Judged, Study


class Asked(NamedTuple):
    """A task ready to be asked: its samples, those in numbers, and the program."""

    task: Judged
    samples: Sequence[Sample]
    examples: Sequence[Example]
    answers: ForcedAnswers
    shape: BatchShape


class Judge:
    """The tasks of a study under one seed. All weights of a model are judged by one program for each task.

    Args:
        study: gives the tasks.
        seed: of the held-out samples.
        model: on the mesh.
        processor: of the model.
        mesh: the devices.

    Raises:
        ConfigError: a task has a sample that cannot be asked; names both.
    """

    def __init__(self, study: Study, seed: int, model: Vlm, processor: Processor, mesh: Mesh):
        self._processor, self._mesh = processor, mesh
        self._tasks = [self._asked(study, task, seed, model) for task in study.tasks]

    def _asked(self, study: Study, task: Judged, seed: int, model: Vlm) -> Asked:
        try:
            source = study.samples_of(task, seed).build()
            samples = [source[i] for i in range(min(task.samples, len(source)))]
            examples = [conversation(self._processor, sample) for sample in samples]
            for sample, example in zip(samples, examples, strict=True):
                _check_answer(sample, example, task)
        except (SampleError, ConfigError) as error:
            raise ConfigError(f"tasks ({task.name}): {error}") from error
        patches = round_up(task.patches, self._processor.rules.patch_sizes.window) if model.vision is not None else 0
        shape = BatchShape(round_up(task.rows, row_ways(self._mesh)), task.tokens, patches)
        forced = ForcedAnswers(model, self._processor, self._mesh, shape, task.answer_tokens)
        return Asked(task, samples, examples, forced, shape)

    @property
    def samples(self) -> dict[str, int]:
        """How many each task asks: fewer than it says where its source has fewer."""
        return {asked.task.name: len(asked.samples) for asked in self._tasks}

    def scores(self, model: Vlm, most: int | None = None) -> dict[str, float]:
        """Share of right answers of each task.

        Args:
            model: with any weights.
            most: samples of each task; None asks all.

        Raises:
            ConfigError: a sample is over its task's budget.
        """
        found = {}
        for asked in self._tasks:
            try:
                names = [sample.called for sample in asked.samples[:most]]
                right = asked.answers.on(model)(asked.examples[:most], names)
            except SampleError as error:
                raise ConfigError(f"tasks ({asked.task.name}): {error}") from error
            found[asked.task.name] = float(right.mean())
        return found

    def findings(self, model: Vlm) -> dict[str, float]:
        """Of tasks with `routes`, means over their first so many samples: entries that text queries read, visual tokens
        there are, and how many of the chosen regions lie on the evidence, each as `TASK/NAME`."""
        return {
            f"{asked.task.name}/{name}": value
            for asked in self._tasks
            if asked.task.routes
            for name, value in self._read_of(model, asked).items()
        }

    def _read_of(self, model: Vlm, asked: Asked) -> dict[str, float]:
        samples = asked.samples[: asked.task.routes]
        prompts = [self._processor.encode(sample.prompt, add_generation_prompt=True) for sample in samples]
        readings = [account(prompt.info, model.config.text, model.options) for prompt in prompts]
        known = [reading for reading in readings if reading is not None]
        if not known:
            return {}
        found = {name: float(np.mean([getattr(one, name) for one in known])) for name in ("entries", "visual")}
        if model.options.layout.regions is None:
            return found
        subject = ModelSubject(model, self._processor, self._mesh, asked.shape, asked.task.answer_tokens)
        answers = [Answer(s.answers[0], tuple(self._processor.tokenizer.encode(s.answers[0]))) for s in samples]
        summary = summary_of(samples, subject.route(samples, answers))
        if summary is None or summary.hits is None:
            return found
        return found | {"on_evidence": summary.hits.accuracy, "chance": summary.hits.chance}


def _check_answer(sample: Sample, example: Example, task: Judged) -> None:
    """Refuse a sample that does not fit what the task says of its size."""
    answer = len(asked_at(example, "accuracy")[1])
    for name, given, most in (
        ("answer_tokens", answer, task.answer_tokens),
        ("tokens", len(example.tokens), task.tokens),
        ("patches", example.patches.length, task.patches),
    ):
        if given > most:
            raise ConfigError(f"{sample.called} needs {name} {given}, but {name} is {most}")


def mean_score(scores: dict[str, float]) -> float:
    """Mean over tasks."""
    return float(np.mean([*scores.values()]))
