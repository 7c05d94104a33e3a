"""A task: what it adds to a question, which part of a text it takes for the answer, and how an evaluation uses it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rave_jax.config import ConfigError, from_json, to_json
from rave_jax.data.sample import Sample
from rave_jax.evaluation.config import Eval, Floor, Grounding
from rave_jax.evaluation.suites import run
from rave_jax.evaluation.summary import GREY, REDEALT
from rave_jax.evaluation.task import Task
from tests.evaluation.toy import Fake, Toy, any_source, read

ASKING = Task(instruction="Think, then write 'Answer:' and a number.", marker="Answer:", lines="first")


def spoken(sample: Sample) -> str:
    """A subject that does as it is told: without the instruction it only thinks."""
    if not sample.question.endswith(f"\n{ASKING.instruction}"):
        return "I see a picture."
    return f"No Answer: yet.\nAnswer: {read(sample)}\nThat is all."


def config(task: Task, **changes: Any) -> Eval:
    values = {"samples": 40, "rows": 16, "looks": 4, "pictures": 0, "vas": 4, "routes": 4, "grounding": Grounding()}
    return Eval("toy", any_source(Toy()), task=task, **{**values, **changes})


def test_a_task_without_settings_changes_nothing() -> None:
    sample = Toy()[0]
    assert Task().prompt(sample) is sample
    assert Task().parse(" a\n\nb ") == " a\n\nb "
    assert Task().metric_of(sample) == "exact_match"


def test_the_instruction_stands_behind_the_last_question() -> None:
    first, answer = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Two?"}]
    for last in ("Two?", parts):
        sample = Sample("a", (first, answer, {"role": "user", "content": last}, answer), ("1",))
        asked = Task(instruction="Be brief.").prompt(sample)
        assert asked.question == "Two?\nBe brief."
        assert asked.images == sample.images
        assert (asked.messages[0], asked.messages[3]) == (first, answer)
        assert dataclasses.replace(asked, messages=sample.messages) == sample
        assert sample.question == "Two?", "the sample itself is as it was"


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        (Task(marker="Answer:"), "It is 3. Answer: 4 Answer: 5", " 5"),
        (Task(marker="Answer:"), "5", "5"),
        (Task(marker="Answer:"), "5 Answer:", ""),
        (Task(lines="first"), "\n \n a\nb", " a"),
        (Task(lines="last"), "a\nb\n\n", "b"),
        (Task(lines="last"), " \n", ""),
        (Task(marker="A:", lines="first"), "x\nA: 1\ny", " 1"),
    ],
)
def test_which_part_is_the_answer(task: Task, text: str, answer: str) -> None:
    assert task.parse(text) == answer


def test_the_metric_is_the_task_s_or_the_sample_s() -> None:
    odd = dataclasses.replace(Toy()[0], metric="anls")
    assert (Task().metric_of(odd), Task(metric="relaxed_accuracy").metric_of(odd)) == ("anls", "relaxed_accuracy")
    unknown = dataclasses.replace(odd, metric="bleu")
    assert Task(metric="anls").metric_of(unknown) == "anls"
    with pytest.raises(ConfigError, match=r"toy/heldout/0: metric is 'bleu', expected one of"):
        Task().metric_of(unknown)
    assert Task(marker="A:", metric="relaxed_accuracy").score("relaxed_accuracy", "A: 100", ("103",)) == 1.0


def test_an_evaluation_asks_and_scores_by_its_task(tmp_path: Path) -> None:
    """Answers, controls, looks, VAS and routes are all asked with the instruction; files keep what was said."""
    plain = run(config(Task()), Toy(), Fake(read), None)
    told = Fake(spoken)
    summary = run(config(ASKING), Toy(), told, tmp_path)
    assert summary.total.score == plain.total.score == 1.0
    assert summary.total.controls[REDEALT] == plain.total.controls[REDEALT]
    assert summary.total.controls[GREY] == plain.total.controls[GREY]
    assert told.asked == {f"{question}\n{ASKING.instruction}" for question in ("How bright, odd?", "How bright?")}
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {line["question"] for line in lines} == {"How bright, odd?", "How bright?"}
    assert all(line["prediction"].endswith("That is all.") for line in lines)
    assert run(config(dataclasses.replace(ASKING, marker="")), Toy(), Fake(spoken), None).total.score == 0.0


def test_controls_are_scored_by_the_metric_of_the_task() -> None:
    summary = run(config(Task(metric="anls"), floor=Floor(), grounding=None), Toy(), Fake(read), None)
    assert summary.total.metric == "anls"


def test_configs_keep_the_task_and_those_without_one_are_read() -> None:
    plain = Eval(task=ASKING)
    data = to_json(plain)
    assert from_json(Eval, data) == plain
    del data["task"]
    assert from_json(Eval, data) == Eval()
