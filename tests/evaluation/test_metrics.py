"""Metrics against cases worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.evaluation import metrics

TEXT = st.text(max_size=8)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("7", ("7",), 1),
        (" Blue.", ("blue",), 1),
        ("two  dogs", ("Two dogs",), 1),
        ("7", ("1", "7"), 1),
        ("17", ("7",), 0),
        ("", ("7",), 0),
        (".", (".",), 1),
        ("7", (), 0),
    ],
)
def test_exact_match(prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert metrics.exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("105", ("100",), 1),  # exactly 5 % away
        ("105.01", ("100",), 0),
        ("-95", ("-100",), 1),
        ("95", ("-100",), 0),
        ("12%", ("0.12",), 1),
        ("12", ("12%",), 0),  # a percent sign counts
        ("0", ("0",), 1),
        ("0.0", ("0",), 0),  # 0 has no 5 %: compared as text
        ("nan", ("nan",), 1),
        ("Asia", ("asia",), 1),
        ("Asia", ("Africa",), 0),
        ("50", ("10", "51"), 1),
        ("50", (), 0),
    ],
)
def test_relaxed_accuracy(prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert metrics.relaxed_accuracy(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("receipt", ("receipt",), 1.0),
        ("RECEIPT ", ("receipt",), 1.0),
        ("reciept", ("receipt",), 1 - 2 / 7),
        ("ab", ("ac",), 0.0),  # distance 0.5 is at the threshold
        ("abc", ("abd",), 1 - 1 / 3),
        ("abc", ("xyz", "abcd"), 0.75),
        ("", ("total",), 0.0),
        ("", ("",), 1.0),
    ],
)
def test_anls(prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert metrics.anls(prediction, answers) == pytest.approx(expected)


def test_edit_distance_by_hand() -> None:
    assert metrics.edit_distance("kitten", "sitting") == 3
    assert metrics.edit_distance("", "abc") == 3


@given(TEXT, TEXT, TEXT)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    distance = metrics.edit_distance
    assert distance(a, b) == distance(b, a) <= max(len(a), len(b))
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_every_metric_is_between_0_and_1_and_takes_the_answer_itself(prediction: str, answers: list[str]) -> None:
    for name in metrics.METRICS:
        assert 0.0 <= metrics.score(name, prediction, answers) <= 1.0
        assert metrics.score(name, answers[-1], answers) == 1.0


def test_unknown_metric_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'bleu'.*'exact_match'"):
        metrics.score("bleu", "a", ("a",))
