"""Intervals of scores over pictures: against textbook values, a bootstrap, and the truth they are meant to hold."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from rave_jax.data.sample import Sample
from rave_jax.evaluation.intervals import difference_interval, picture_key, score_interval
from rave_jax.evaluation.paired import Interval, t_975

SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1), min_size=1, max_size=30)


def test_quantiles_are_students() -> None:
    for degrees in (1, 2, 15, 16, 40, 199, 10_000):
        assert t_975(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


def test_independent_answers_have_wilsons_interval() -> None:
    """scipy's Wilson interval with n - 1 in place of n (s^2 / n has n - 1) and the normal quantile of many."""
    n, right = 20_000, 14_100
    scores = [1.0] * right + [0.0] * (n - right)
    found = score_interval(scores, range(n))
    wanted = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-5)


@given(SCORES, st.integers(1, 5))
def test_the_same_answers_again_are_no_new_evidence(scores: list[float], times: int) -> None:
    """Questions asked several times of one picture leave the interval as it is: pictures count."""
    once = score_interval(scores, range(len(scores)))
    again = score_interval(scores * times, list(range(len(scores))) * times)
    assert (again.low, again.high) == pytest.approx((once.low, once.high), abs=1e-6)


@given(SCORES, st.data())
def test_an_interval_holds_the_mean_and_stays_among_scores(scores: list[float], data: Any) -> None:
    pictures = [data.draw(st.integers(0, 4)) for _ in scores]
    found = score_interval(scores, pictures)
    assert 0 <= found.low <= found.high <= 1
    assert found.low - 1e-9 <= np.mean(scores) <= found.high + 1e-9
    assert (found.high - found.low > 0.05) and (len(set(pictures)) > 1 or (found.low, found.high) == (0, 1))


def test_all_right_is_not_certainty() -> None:
    few, many = (score_interval([1.0] * n, range(n)) for n in (10, 400))
    assert few.high == many.high == 1.0 and few.low < 0.75 < 0.98 < many.low < 1.0


def drawn(rng: np.random.Generator, pictures: int) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers to 1 to 8 questions of each picture, which are right together more often than not."""
    counts = rng.integers(1, 9, pictures)
    easy = rng.beta(1.4, 0.6, pictures)
    which = np.repeat(np.arange(pictures), counts)
    return (rng.random(len(which)) < easy[which]).astype(float), which


def test_the_width_is_that_of_a_bootstrap_over_pictures() -> None:
    rng = np.random.default_rng(0)
    scores, which = drawn(rng, 300)
    sums = np.bincount(which, scores)
    counts = np.bincount(which)
    again = rng.integers(0, 300, (4000, 300))
    means = sums[again].sum(1) / counts[again].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    found = score_interval(scores.tolist(), which.tolist())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)
    alone = score_interval(scores.tolist(), range(len(scores)))
    assert high - low > 1.5 * (alone.high - alone.low), "the pictures here do make answers alike"


@pytest.mark.parametrize("pictures", [12, 60])
def test_the_interval_holds_the_truth_95_times_in_100(pictures: int) -> None:
    rng = np.random.default_rng(1)
    held = wide = 0
    for _ in range(1500):
        scores, which = drawn(rng, pictures)
        found = score_interval(scores.tolist(), which.tolist())
        held += found.low <= 0.7 <= found.high
        other = difference_interval((scores - 0.7).tolist(), which.tolist())
        wide += other.low <= 0 <= other.high
    assert 0.93 < held / 1500 < 0.98 and 0.9 < wide / 1500 < 0.98, (held, wide)


def test_a_difference_by_hand() -> None:
    """Eight pictures of two questions, right in half of them: S = 1 and -1 about the mean 0.5."""
    assert difference_interval([1.0, 0.0], ["a", "a"]) == Interval(-1.0, 1.0), "one picture says nothing of others"
    pictures = [number // 2 for number in range(16)]
    found = difference_interval([1.0, 1.0, 0.0, 0.0] * 4, pictures)
    half = 2.364624 * math.sqrt(8 / 7 * 8 / 16**2)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))
    # One of two right in every picture: no picture differs, and independent answers are the least that is assumed.
    found = difference_interval([1.0, 0.0] * 8, pictures)
    half = 2.364624 * math.sqrt(16 * 0.25 / 15 / 16)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))


def sample(*pictures: Any) -> Sample:
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": "What?"}]
    return Sample(id="x", messages=({"role": "user", "content": content},), answers=("a",))


def test_samples_of_one_picture_are_known_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGB", (4, 3), (9, 8, 7))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    forms = (
        ("a.png", str(tmp_path / "a.png")),
        (buffer.getvalue(),) * 2,
        (image, image.copy()),
        (np.zeros((2, 2, 3)),) * 2,
    )
    keys = set()
    for number, (one, same) in enumerate(forms):
        assert picture_key(sample(one), 0) == picture_key(sample(same), 1)
        keys.add(picture_key(sample(one), number))
    assert len(keys) == len(forms)
    assert picture_key(sample("a.png"), 0) != picture_key(sample("a.png", "b.png"), 0)
    assert picture_key(sample(), 0) != picture_key(sample(), 1), "questions without a picture stand alone"
    video = Sample("v", ({"role": "user", "content": [{"type": "video", "video": ["a.png", "b.png"]}]},), ("a",))
    assert picture_key(video, 0) == picture_key(video, 1) == picture_key(sample("a.png", "b.png"), 2)
    file = Sample("v", ({"role": "user", "content": [{"type": "video", "video": "b.mp4"}]},), ("a",))
    assert picture_key(file, 0) == picture_key(file, 1) == picture_key(sample("b.mp4"), 2)
