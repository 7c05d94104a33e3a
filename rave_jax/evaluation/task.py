"""A task: how samples are asked, which part of what the model says is the answer, and how the answer is scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rave_jax.data.sample import Message, Sample
from rave_jax.evaluation.metrics import check_metric, score


@dataclass(frozen=True)
class Task:
    """How samples are asked and their answers scored. Without settings a sample is asked and scored as it stands."""

    instruction: str = ""
    """Text on a line of its own behind each last question, such as "Answer with one word."; empty adds nothing."""
    marker: str = ""
    """The answer is what the model says behind the last occurrence of this text, such as "Answer:", and all that it
    says where this text does not occur."""
    lines: Literal["all", "first", "last"] = "all"
    """Which of its lines are the answer, blank ones not counted."""
    metric: Literal["exact_match", "relaxed_accuracy", "anls"] | None = None
    """How answers are scored; None takes the metric of each sample."""

    def prompt(self, sample: Sample) -> Sample:
        """The sample as it is asked: the instruction stands behind its last question."""
        asked = [number for number, message in enumerate(sample.messages) if message["role"] == "user"]
        if not self.instruction or not asked:
            return sample
        messages = list(sample.messages)
        messages[asked[-1]] = _with_text(messages[asked[-1]], f"\n{self.instruction}")
        return dataclasses.replace(sample, messages=tuple(messages))

    def parse(self, text: str) -> str:
        """The answer in what the model said."""
        if self.marker and self.marker in text:
            text = text.rpartition(self.marker)[2]
        if self.lines == "all":
            return text
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[0 if self.lines == "first" else -1] if lines else ""

    def metric_of(self, sample: Sample) -> str:
        """The metric of a sample.

        Raises:
            ConfigError: the sample names one that does not exist.
        """
        if self.metric is not None:
            return self.metric
        check_metric(sample.metric, f"{sample.called}: ")
        return sample.metric

    def score(self, metric: str, text: str, answers: Sequence[str]) -> float:
        """Score of what the model said, 0 to 1, by a metric of `metric_of`."""
        return score(metric, self.parse(text), answers)


def _with_text(message: Message, text: str) -> Message:
    content = message["content"]
    added = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return {**message, "content": added}
