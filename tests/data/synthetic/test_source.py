"""The source as the pipeline sees it: samples by index, mixtures, and configs that are refused."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest

from rave_jax.config import ConfigError, dumps, loads
from rave_jax.data.sample import Sample, message_text
from rave_jax.data.synthetic import (
    Album,
    BarChart,
    Counting,
    DigitMosaic,
    LongReceipt,
    MosaicList,
    Receipt,
    Scatter,
    Synthetic,
)
from tests.data.synthetic.cases import TASKS


def _same(a: Sample, b: Sample) -> bool:
    words = [dataclasses.replace(s, messages=()) for s in (a, b)]
    texts = [[m["content"] for m in s.messages[1:]] + [message_text(s.messages[0])] for s in (a, b)]
    return words[0] == words[1] and texts[0] == texts[1] and all(map(np.array_equal, a.images, b.images))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(("task", "image_size"), TASKS)
def test_sample(task, image_size, split):
    source = Synthetic((task,), split, seed=5, image_size=image_size, length=40).build()
    assert len(source) == 40
    for index in (0, 7, 39):
        sample = source[index]
        assert sample.task == task.name
        assert sample.template.startswith(f"{task.name}.")
        assert sample.source == source.name == "synthetic"
        width = round(image_size * getattr(task, "width", 1))
        for picture in sample.images:
            assert picture.dtype == np.uint8
            assert picture.shape == (image_size, width, 3)
        assert 0 <= sample.evidence_image < len(sample.images) <= getattr(task, "max_pictures", 1)
        turns = min(2, task.max_questions) if split == "train" else 1
        assert [m["role"] for m in sample.messages] == ["user", "assistant"] * turns
        assert sample.answers == (sample.messages[-1]["content"],)
        questions = [message_text(message) for message in sample.messages]
        assert len(set(questions[::2])) == turns
        x1, y1, x2, y2 = sample.evidence
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= image_size


@pytest.mark.parametrize(("task", "image_size"), TASKS)
def test_samples_follow_from_seed_split_and_index(task, image_size):
    config = Synthetic((task,), "train", seed=2, image_size=image_size)
    first, again = config.build(), config.build()
    backwards = [again[i] for i in reversed(range(8))][::-1]
    assert all(_same(first[i], backwards[i]) for i in range(8))
    assert _same(first.redeal(3), again.redeal(3))
    others = (dataclasses.replace(config, seed=3), dataclasses.replace(config, split="heldout"))
    for other in (first, *(config.build() for config in others)):
        assert not _same(first[0], other[1])
    for other in others:
        assert not _same(first[0], other.build()[0])
    assert len({first[i].id for i in range(8)} | {first.redeal(i).id for i in range(8)}) == 16


def test_mixture_by_weight():
    tasks = (DigitMosaic(weight=1.0), BarChart(weight=2.0), Counting(weight=5.0))
    source = Synthetic(tasks, length=1200).build()
    seen = collections.Counter(source[i].task for i in range(1200))
    expected = {"digit_mosaic": 150, "bar_chart": 300, "counting": 750}
    assert seen.keys() == expected.keys()
    for name, number in expected.items():
        assert abs(seen[name] - number) < 60


def test_index_out_of_range():
    source = Synthetic(length=3).build()
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"sample {index} of a synthetic source of 3"):
            source[index]


def test_config_round_trip():
    config = Synthetic((Counting(ask=("both",)), Receipt()), "heldout", image_size=224)
    assert loads(Synthetic, dumps(config)) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Synthetic(()), "tasks is .*at least one task"),
        (lambda: Synthetic((Receipt(),)), r"image_size \(for receipt\) is 84, expected at least 224"),
        (lambda: Synthetic((BarChart(ask=("label",)),)), r"image_size \(for bar_chart\) is 84"),
        (lambda: Synthetic(questions_per_image=3), "questions_per_image is 3, expected 1 to 2"),
        (lambda: Synthetic((MosaicList(),), questions_per_image=2), "questions_per_image is 2, expected 1 to 1"),
        (lambda: Synthetic(length=0), "length is 0"),
        (lambda: Synthetic(seed=-1), "seed is -1"),
        (lambda: DigitMosaic(weight=0), "weight is 0"),
        (lambda: DigitMosaic(max_grid=4), "max_grid is 4"),
        (lambda: DigitMosaic(min_grid=3, max_grid=2), "min_grid is 3"),
        (lambda: DigitMosaic(frame=2), "frame is 2, expected max_grid"),
        (lambda: Synthetic((DigitMosaic(frame=6),)), r"image_size \(for digit_mosaic\) is 84, expected at least 96"),
        (lambda: BarChart(max_bars=10), "max_bars is 10"),
        (lambda: BarChart(ask=()), "ask is"),
        (lambda: Counting(max_count=10), "max_count is 10, expected 1 to 9"),
        (lambda: Receipt(min_lines=4), "min_lines is 4"),
        (lambda: Receipt(ask=("total", "total")), "ask is"),
        (lambda: Scatter(min_objects=0), "min_objects is 0, expected 1 to max_objects"),
        (lambda: Scatter(max_objects=30), "max_objects is 30, expected at most 16: a shape and colour .2 x 8. and a"),
        (lambda: Scatter(kinds=5), "kinds is 5, expected 1 to 4"),
        (lambda: Scatter(size=0.2), "size is 0.2, expected 0.4 to 1"),
        (lambda: Scatter(grid=13), "grid is 13"),
        (lambda: Scatter(clutter=-1), "clutter is -1"),
        (lambda: Synthetic((Scatter(grid=8),)), r"image_size \(for scatter\) is 84, expected at least 125"),
        (lambda: LongReceipt(max_lines=27), "max_lines is 27, expected at most 26: a code for each line"),
        (lambda: LongReceipt(room=5), "room is 5, expected max_lines .12. to 100"),
        (lambda: LongReceipt(letters=3), "letters is 3"),
        (lambda: LongReceipt(digits=0), "digits is 0"),
        (lambda: LongReceipt(width=2.0), "width is 2.0, expected 0.1 to 1"),
        (lambda: Synthetic((LongReceipt(),)), r"image_size \(for long_receipt\) is 84, expected at least 108"),
        (lambda: Album(max_pictures=9), "max_pictures is 9, expected at most 8"),
        (lambda: Album(min_pictures=5), "min_pictures is 5"),
        (lambda: Album(max_grid=4), "max_grid is 4"),
    ],
)
def test_bad_configs_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
