"""Train and held-out share no content, questions cannot be guessed, and receipts have enough on them."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from rave_jax.data.synthetic import (
    Album,
    BarChart,
    Counting,
    DigitMosaic,
    LongReceipt,
    MosaicList,
    PositionMosaic,
    Receipt,
    Scatter,
    Synthetic,
    canvas,
    digits,
    palette,
)
from rave_jax.data.synthetic.base import SPLITS
from rave_jax.data.synthetic.words import WORDS
from tests.data.synthetic.cases import TASKS, scenes


def _both(task, number, content):
    """The content of many scenes of each split."""
    return [{c for scene, _, _ in scenes(task, split, number) for c in content(scene)} for split in SPLITS]


def test_digit_pictures_are_disjoint():
    ink, labels = digits.load()
    train, heldout = ({ink[i].tobytes() for of in digits.members(split) for i in of} for split in SPLITS)
    assert not train & heldout
    assert len(train | heldout) == len({picture.tobytes() for picture in ink})
    for split, least in (("train", 120), ("heldout", 20)):
        for label, of in enumerate(digits.members(split)):
            assert len(of) >= least
            assert set(labels[of]) == {label}


@pytest.mark.parametrize("task", [DigitMosaic(), PositionMosaic(), MosaicList()])
def test_mosaics_share_neither_digits_nor_arrangements(task):
    ink, _ = digits.load()
    train, heldout = _both(task, 400, lambda scene: [ink[number].tobytes() for number in scene.pictures])
    assert not train & heldout
    assert len(heldout) > 200
    train, heldout = _both(task, 400, lambda scene: [scene.arrangement])
    assert not train & heldout


# Few bars, values and cells: the same scene would come up in both splits within these many draws by chance.
@pytest.mark.parametrize(
    ("task", "content"),
    [
        (BarChart(max_bars=2, max_value=4), lambda chart: [(chart.colours, chart.values)]),
        (Counting(grid=2, max_count=1), lambda shapes: [shapes.things]),
        (Scatter(min_objects=1, max_objects=2, kinds=1, colours=4, grid=3), lambda scene: [scene.arrangement]),
        (LongReceipt(min_lines=1, max_lines=1, digits=2), lambda scene: [(scene.codes, scene.prices)]),
        (Album(min_pictures=1, max_pictures=2), lambda scene: [one.arrangement for one in scene]),
    ],
)
def test_charts_and_shapes_share_no_layout(task, content):
    train, heldout = _both(task, 800, content)
    assert not train & heldout
    assert len(heldout) > 100


def test_words_are_disjoint():
    train, heldout = (
        {w.lower() for ws in vars(WORDS[s]).values() for text in ws for w in text.split()} for s in SPLITS
    )
    assert not train & heldout
    assert min(len(train), len(heldout)) >= 40


def test_receipts_share_no_word_price_or_total():
    def own(bill):
        words = f"{bill.shop} {bill.farewell} " + " ".join(line.item for line in bill.lines)
        amounts = [line.cents for line in bill.lines] + [bill.total]
        return words.lower().split() + amounts + bill.street.split()[1:]

    train, heldout = _both(Receipt(), 150, own)
    assert not train & heldout
    for seen in (train, heldout):
        assert len([word for word in seen if isinstance(word, str)]) >= 40


def test_labels_under_bars_share_no_word():
    train, heldout = _both(BarChart(ask=("label",)), 100, lambda chart: chart.labels)
    assert not train & heldout


def test_every_receipt_has_forty_words_in_three_sizes_and_they_fit(monkeypatch):
    sizes = collections.defaultdict(set)
    task = Receipt()
    real = canvas.text
    for split in SPLITS:
        for number, (scene, _, _) in enumerate(scenes(task, split, 25)):
            assert len(task.words(scene)) >= 44

            def spy(words, size, bold=False, number=number):
                sizes[number].add(size)
                return real(words, size, bold)

            monkeypatch.setattr(canvas, "text", spy)
            picture = task.paint(scene, 224)
            monkeypatch.setattr(canvas, "text", real)
            assert len(sizes[number]) >= 3
            assert min(sizes[number]) >= 8  # pixels
            ink = (picture < 128).all(2)
            border = np.concatenate([ink[:2].ravel(), ink[-2:].ravel(), ink[:, :6].ravel(), ink[:, -6:].ravel()])
            assert not border.any()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "task",
    [
        DigitMosaic(),
        PositionMosaic(),
        BarChart(),
        Counting(),
        Counting(grid=4, max_count=9, ask=("both",)),
        Scatter(),
        LongReceipt(),
        Album(),
    ],
)
def test_answers_are_balanced(task, split):
    answers = collections.defaultdict(collections.Counter)
    for scene, asked, _ in scenes(task, split, 450, count=2):
        answers[asked[-1].template][task.answer(scene, asked[-1])] += 1
    for counter in answers.values():
        tens = (DigitMosaic, PositionMosaic, Scatter, LongReceipt, Album)
        possible = 10 if isinstance(task, tens) else 9 if isinstance(task, BarChart) else task.max_count + 1
        assert len(counter) == possible
        share = counter.most_common(1)[0][1] / counter.total()
        assert share <= 1 / possible + 4.5 * (1 / possible / counter.total()) ** 0.5
        assert share <= 0.23
        assert max(map(len, counter)) == 1


def test_question_alone_says_little():
    """The quickstart's floor: the most frequent training answer of each question text, on held-out samples."""
    by_text = collections.defaultdict(collections.Counter)
    for task in Synthetic().tasks:
        for scene, asked, _ in scenes(task, "train", 900, count=2):
            by_text[asked[-1].text][task.answer(scene, asked[-1])] += 1
    right = [
        task.answer(scene, question) == by_text[question.text].most_common(1)[0][0]
        for task in Synthetic().tasks
        for scene, (question,), _ in scenes(task, "heldout", 400)
    ]
    assert np.mean(right) <= 0.2


@pytest.mark.parametrize(("task", "image_size"), TASKS)
def test_pictures_of_the_splits_differ(task, image_size):
    train, heldout = (
        {task.paint(scene, image_size).tobytes() for scene, _, _ in scenes(task, split, 30)} for split in SPLITS
    )
    assert len(train) == len(heldout) == 30
    assert not train & heldout


def test_a_list_names_every_cell_once_with_its_digit_right_behind_the_colour():
    task = MosaicList()
    sizes, orders = set(), set()
    for scene, (question,), _ in scenes(task, "train", 60):
        names = [palette.NAMES[colour] for colour in scene.colours]
        expected = {name + str(scene.label(cell)) for cell, name in enumerate(names)}
        listed = task.answer(scene, question).split(" ")
        assert len(listed) == len(names)
        assert set(listed) == expected
        sizes.add(len(names))
        orders.add(question.target)
    assert sizes == {4, 6, 9}
    assert len(orders) > 40, "colours come in any order"


@pytest.mark.parametrize("task", [DigitMosaic(), PositionMosaic(), MosaicList()])
def test_small_mosaics_stand_anywhere_on_the_frame_of_the_largest(task):
    corners = collections.defaultdict(set)
    for scene, _, _ in scenes(task, "train", 300):
        corners[scene.rows, scene.cols].add(scene.corner)
        picture = task.paint(scene, 84)
        for cell in range(scene.rows * scene.cols):
            left, top, right, bottom = scene.edges(cell, 84)
            assert (right - left, bottom - top) == (28, 28)
            assert tuple(picture[top, left]) == palette.RGB[scene.colours[cell]]
        painted = (picture != palette.PAPER).any(2)
        assert painted.sum() <= scene.rows * scene.cols * 28**2
    assert {size: len(places) for size, places in corners.items()} == {(2, 2): 4, (2, 3): 2, (3, 2): 2, (3, 3): 1}
