"""Asked again: which passes are run, what is asked at last, and that the neutral setting asks once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rave_jax.config import ConfigError, from_json, to_json
from rave_jax.data.images import read_image
from rave_jax.data.sample import OverBudget, Sample, SampleError
from rave_jax.data.sources import Synthetic
from rave_jax.data.synthetic import Album
from rave_jax.evaluation.again import AskedAgain, about_picture, with_pictures
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.subject import Answer
from rave_jax.evaluation.suites import open_checked, run
from rave_jax.evaluation.task import Task
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.look.carve import Carve
from rave_jax.look.funnel import VisualFunnel
from tests.evaluation.toy import Fake, Toy, any_source

CARVE = Carve(layers=(0, 1), fraction=0.3)
FUNNEL = VisualFunnel(layer=1, base=4.0)
TASK = Task(instruction="One word.")


class Noted(Fake):
    """Keeps what it is asked, and says two words."""

    def __init__(self) -> None:
        super().__init__(lambda sample: "a b")
        self.samples: list[Sample] = []

    def answer(self, samples: Sequence[Sample]) -> list[Answer | SampleError]:
        self.samples += samples
        return [dataclasses.replace(one, tokens=(1, 2)) for one in super().answer(samples) if isinstance(one, Answer)]


def sizes(sample: Sample) -> list[tuple[int, int]]:
    return [read_image(image).size for image in sample.images]


def test_carve_asks_the_question_and_a_description_and_then_both_views() -> None:
    subject, sample = Noted(), Toy()[1]
    (answer,) = AskedAgain(subject, CARVE, TASK).answer([sample])
    asked = [one.question for one in subject.samples]
    assert asked == ["How bright, odd?\nOne word.", f"{CARVE.general}\nOne word.", "How bright, odd?\nOne word."]
    # All that is looked at more is the picture's upper left quarter, which is enlarged until it covers 8 x 6.
    assert [len(sizes(one)) for one in subject.samples] == [1, 1, 2]
    first, second = sizes(subject.samples[2])
    assert first == (8, 6) and second[0] >= 8 and second[1] >= 6
    assert isinstance(answer, Answer) and answer.text == "a b"


def test_the_funnel_asks_where_to_look_and_then_four_views() -> None:
    subject, sample = Noted(), Toy()[1]
    AskedAgain(subject, FUNNEL, TASK).answer([sample])
    assert subject.asked == {
        "To answer 'How bright, odd?', where in the image should I look?",
        "How bright, odd?\nOne word.",
    }
    (last,) = subject.samples
    # One cell of four has it all, so the crops are as narrow as they can be: 4, 1.2 x 4 and 1.6 x 4 pixels.
    assert sizes(last) == [(8, 6), (4, 4), (5, 5), (6, 6)]
    kinds = [part["type"] for part in last.messages[0]["content"]]
    assert kinds == ["image"] * 4 + ["text", "text"], "views stand behind the picture"


@pytest.mark.parametrize("how", [Carve(fraction=1.0), VisualFunnel(views=("whole",))], ids=["Carve", "VisualFunnel"])
def test_the_neutral_setting_asks_once_as_without_it(how: Any) -> None:
    subject, picture = Noted(), Toy()[0].images[0]
    AskedAgain(subject, how, TASK).answer([Toy()[0]])
    (asked,) = subject.samples
    assert asked.question == TASK.prompt(Toy()[0]).question
    np.testing.assert_array_equal(asked.images, [picture])


def test_who_cannot_be_asked_or_has_no_picture() -> None:
    class Picky(Noted):
        def answer(self, samples: Sequence[Sample]) -> list[Answer | SampleError]:
            said = super().answer(samples)
            return [
                OverBudget("too long") if "odd" in s.question else one for s, one in zip(samples, said, strict=True)
            ]

    text = Sample(id="t", messages=({"role": "user", "content": "Why?"},), answers=("x",))
    found = AskedAgain(Picky(), CARVE, Task()).answer([Toy()[1], text, Toy()[0]])
    assert [type(one) for one in found] == [OverBudget, Answer, Answer]


def test_an_evaluation_asks_again_and_its_probes_see_the_same_pictures() -> None:
    class Counted(Noted):
        def look(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Any:
            assert all(len(sample.images) == 4 for sample in samples)
            return super().look(samples, answers)

    config = Eval("toy", any_source(Toy()), samples=4, rows=2, looks=2, pictures=0, floor=None, again=FUNNEL)
    subject = Counted()
    found = run(config, Toy(), subject, None)
    assert len(subject.samples) == 4 and found.total.samples == 4
    config = dataclasses.replace(config, data=Synthetic(split="heldout"))
    assert from_json(Eval, to_json(config)) == config
    for how in (CARVE, FUNNEL):
        with pytest.raises(
            ConfigError, match=rf"again \({type(how).__name__}\) has 1, but the model's layers are 0 to 0"
        ):
            open_checked(dataclasses.replace(config, again=how), tiny(vocab_size=64, num_layers=1).text)


def test_evidence_stays_in_its_picture_when_the_first_one_is_cut() -> None:
    source = Synthetic((Album(min_pictures=3, max_pictures=3),), "heldout", image_size=56).build()
    samples = [source[n] for n in range(12)]
    assert {one.evidence_image for one in samples} == {0, 1, 2}
    for sample in samples:
        first = read_image(sample.images[0])
        cut = with_pictures(sample, [first, first.crop((0, 0, 28, 28))])
        assert len(cut.images) == 4
        assert np.array_equal(read_image(cut.evidence_picture), read_image(sample.evidence_picture))
        alone = about_picture(sample, "What is there?")
        assert len(alone.images) == 1 and (alone.evidence is None) == (sample.evidence_image > 0)
