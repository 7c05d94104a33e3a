"""The grounding check: does the model answer from the evidence in the picture? Numbers in, a verdict out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rave_jax.config import require


@dataclass(frozen=True)
class TaskAim:
    """A score that one task must reach."""

    task: str = "digit_mosaic"
    """Name of the task, as the samples give it."""
    at_least: float = 0.8
    """Least mean score, 0 to 1."""

    def __post_init__(self) -> None:
        require(0 <= self.at_least <= 1, "at_least", self.at_least, "a score between 0 and 1")


@dataclass(frozen=True)
class Verdict:
    """What the grounding check says.

    Attributes:
        floors: question-only scores by name; the largest counts.
        redealt: score on pictures whose evidence was changed, against the original answers.
        findings: one sentence per condition, with its numbers.
        holds: whether every condition holds.
    """

    score: float
    floors: Mapping[str, float]
    redealt: float
    margin: float
    findings: tuple[str, ...]
    holds: bool

    @property
    def floor(self) -> float:
        """The question-only floor."""
        return max(self.floors.values())


def judge(
    score: float,
    floors: Mapping[str, float],
    redealt: float,
    margin: float,
    task_scores: Mapping[str, float],
    aims: tuple[TaskAim, ...] = (),
    words: Mapping[str, str] = MappingProxyType({}),
) -> Verdict:
    """Compare a score with its controls; all are mean scores over the same samples.

    Args:
        score: of the model.
        floors: question-only scores by name, at least one.
        redealt: score of the model on pictures whose evidence was changed.
        margin: how far the score must be above the floor and above `redealt`.
        task_scores: score of the model per task.
        aims: what single tasks must reach; a task that was not asked does not hold.
        words: what findings call a floor; its name where this has none.
    """
    name, floor = max(floors.items(), key=lambda item: item[1])
    controls = ((floor, f"without looking ({words.get(name, name)})"), (redealt, "with the evidence changed"))
    oks = [score - control >= margin - 1e-9 for control, _ in controls]
    findings = [
        f"{_word(ok)}: score {score:.1%} against {control:.1%} {what}: "
        f"{100 * (score - control):+.1f} points, wanted {100 * margin:+.0f}"
        for ok, (control, what) in zip(oks, controls, strict=True)
    ]
    for aim in aims:
        given = task_scores.get(aim.task)
        ok = given is not None and given >= aim.at_least
        oks.append(ok)
        reached = "was not asked" if given is None else f"{given:.1%}"
        findings.append(f"{_word(ok)}: {aim.task} {reached}, wanted {aim.at_least:.0%}")
    return Verdict(score, dict(floors), redealt, margin, tuple(findings), all(oks))


def _word(ok: bool) -> str:
    return "holds" if ok else "does not hold"
