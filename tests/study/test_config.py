"""What a study is: its cells, what an arm's run is made of, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from rave_jax.checkpoint.tiny import Tiny
from rave_jax.config import ConfigError
from rave_jax.data.synthetic import Synthetic
from rave_jax.study.config import Arm, Cell, Judged, Start, Study
from rave_jax.training.init import FromHF
from tests.study.small import BIASED, RECIPE, small


def cell(study: Study, name: str, seed: int) -> Cell:
    return next(one for one in study.cells((name,), (seed,)))


def test_every_arm_of_a_seed_comes_before_the_next_seed() -> None:
    study = small(seeds=(4, 1))
    assert [one.name for one in study.cells()][:6] == [
        "off-4",
        "biased-4",
        "slow-4",
        "learned-4",
        "learned-biased-4",
        "off-1",
    ]
    assert [one.name for one in study.cells(("slow",), (1,))] == ["slow-1"]


def test_an_arm_differs_from_its_control_in_what_it_replaces_alone() -> None:
    study = small()
    off, biased = (study.run_of(cell(study, name, 2), "") for name in ("off", "biased"))
    assert biased.model == BIASED and dataclasses.replace(biased, model=off.model) == off


def test_a_seed_is_that_of_weights_order_and_questions() -> None:
    study = small()
    run = study.run_of(cell(study, "off", 2), "")
    assert run.seed == run.data.seed == 2 and isinstance(run.init, Tiny) and run.init.seed == 2
    source = study.samples_of(study.tasks[0], 2)
    assert isinstance(source, Synthetic) and source.seed == 2
    assert run.final == () and run.save_every == 2 and run.keep >= 2, "a checkpoint for each score of the curve"


def test_behind_phases_an_arm_goes_on_with_other_samples() -> None:
    study = small()
    phase = study.phase_of(study.starts[1], 0, 2, "")
    run = study.run_of(cell(study, "learned-biased", 2), "somewhere")
    assert phase.init == dataclasses.replace(RECIPE.init, seed=2) and run.init == FromHF("somewhere")
    assert phase.data.seed == 2 and run.data.seed == 1002 and run.steps == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": (1, 1)}, r"seeds is \(1, 1\), expected different numbers"),
        ({"seeds": ()}, "seeds is"),
        ({"arms": (Arm("a/b", "scratch"),)}, "arms.0.name is 'a/b', expected letters, digits"),
        (
            {"arms": (Arm("a", "scratch"), Arm("a", "learned"))},
            "arms.0.name is 'a', expected a name that no other of arms",
        ),
        ({"arms": (Arm("a", "nowhere"),)}, r"arms.0 \(a\): start is 'nowhere', expected one of scratch, learned"),
        (
            {"arms": (Arm("a", "scratch", "b"), Arm("b", "learned"))},
            r"\(a\): control is 'b', expected empty, or an arm of",
        ),
        ({"arms": (Arm("a", "scratch", "a"),)}, r"\(a\): control is 'a'"),
        (
            {"arms": (Arm("a", "scratch", trained=False),)},
            r"\(a\): trained is False, expected True: 'scratch'",
        ),
        (
            {"arms": (Arm("a", "learned", steps=3, trained=False),)},
            r"\(a\): steps is 'given', expected None for an",
        ),
        ({"arms": (Arm("a", "scratch", steps=0),)}, r"arms.0 \(a\): steps is 0"),
        ({"starts": ()}, r"start is 'scratch', expected a start of the study, whose `starts` are empty"),
        ({"tasks": ()}, r"tasks is \(\), expected at least one"),
        ({"starts": (Start("", (), RECIPE),)}, "starts.0.name is ''"),
        ({"output_dir": "gs://bucket/x"}, "output_dir is 'gs://bucket/x'"),
    ],
)
def test_what_is_no_study_is_refused_by_its_field(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small(**changes)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Start("s", RECIPE), "phases is TrainConfig.*, expected a tuple, each item a TrainConfig"),
        (lambda: Arm("a", "s", model=BIASED.mechanisms), "model is .*, expected a ModelOptions or None"),
        (lambda: Judged(data="heldout.jsonl"), "data is 'heldout.jsonl', expected a"),
        (lambda: small(arms=Arm("a", "scratch")), "arms is .*, expected a tuple, each item a"),
        (lambda: small(seeds=[0, 1]), r"seeds is \[0, 1\], expected a tuple, each item an integer"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_field(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        make()


def test_a_task_may_not_have_the_name_of_their_mean() -> None:
    with pytest.raises(ConfigError, match="name is 'all', expected another name"):
        Judged("all")


def test_an_arm_or_a_seed_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--arm is 'of', expected one of off, biased"):
        small().cells(("of",))
    with pytest.raises(ConfigError, match="--seed is 7, expected one of 0, 1, 2"):
        small().cells((), (7,))
