"""The evidence box holds what carries the answer, and dealing it anew changes the answer and little else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rave_jax.data.synthetic import (
    Album,
    BarChart,
    Counting,
    DigitMosaic,
    LongReceipt,
    PositionMosaic,
    Receipt,
    Scatter,
    Synthetic,
    canvas,
    palette,
    shapes,
)
from rave_jax.data.synthetic.base import SPLITS
from rave_jax.evaluation.metrics import score
from tests.data.synthetic.cases import TASKS, scenes


def _outside(changed, *boxes):
    """Whether a pixel outside all the boxes is set."""
    rest = changed.copy()
    for x1, y1, x2, y2 in boxes:
        rest[int(y1) : int(y2), int(x1) : int(x2)] = False
    return rest.any()


def _pairs(task, scene, new, image_size):
    """The pictures of a scene, each with that of a new one."""
    before, after = task.paint(scene, image_size), task.paint(new, image_size)
    return [(before, after)] if before.ndim == 3 else list(zip(before, after, strict=True))


def _changed(a, b):
    return (a != b).any(2)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("task", "image_size"), TASKS)
def test_redealt_evidence_makes_the_old_answer_wrong(task, image_size, split):
    for scene, asked, rng in scenes(task, split, 30, count=2):
        question = asked[-1]
        old = task.answer(scene, question)
        new = task.redeal(rng, split, scene, question)
        assert score(question.metric, task.answer(new, question), (old,)) == 0.0
        # A list of several pictures may change in another than the first.
        changed = [_changed(a, b) for a, b in _pairs(task, scene, new, image_size)]
        if question.template == "album.all":
            assert sum(c.any() for c in changed) == 1
            continue
        changed = changed[question.picture]
        # Where a bar gets shorter or a shape goes, the change is in the old box.
        inside = np.zeros_like(changed)
        for x1, y1, x2, y2 in (task.evidence(s, question, image_size) for s in (scene, new)):
            inside[int(y1) : int(y2), int(x1) : int(x2)] = True
        assert (changed & inside).any()


@pytest.mark.parametrize(("task", "image_size"), TASKS)
def test_redealt_sample_keeps_question_and_answer(task, image_size):
    source = Synthetic((task,), "heldout", image_size=image_size, length=12).build()
    for index in range(12):
        sample, redealt = source[index], source.redeal(index)
        kept = ("answers", "metric", "template", "task", "question")
        assert [getattr(sample, k) for k in kept] == [getattr(redealt, k) for k in kept]
        assert redealt.id == sample.id + "/redealt"
        pairs = zip(sample.images, redealt.images, strict=True)
        assert sum(not np.array_equal(*pair) for pair in pairs) == 1


@pytest.mark.parametrize("task", [DigitMosaic(), PositionMosaic()])
def test_mosaics_change_only_in_the_evidence(task):
    for scene, (question,), rng in scenes(task, "heldout", 60):
        new = task.redeal(rng, "heldout", scene, question)
        box = task.evidence(scene, question, 84)
        assert box == task.evidence(new, question, 84)
        assert not _outside(_changed(task.paint(scene, 84), task.paint(new, 84)), box)
        assert (box[2] - box[0]) * (box[3] - box[1]) == 28 * 28


def test_mosaic_box_has_the_asked_colour():
    task = DigitMosaic()
    for scene, (question,), _ in scenes(task, "train", 40):
        name = question.text.split()[-2]
        x1, y1, _, _ = map(int, task.evidence(scene, question, 84))
        assert tuple(task.paint(scene, 84)[y1, x1]) == palette.RGB[palette.NAMES.index(name)]


@pytest.mark.parametrize("marks", ["gridlines", "values", "both"])
def test_bars_change_only_in_the_evidence_and_stand_for_their_value(marks):
    task = BarChart(marks=marks)
    for scene, (question,), rng in scenes(task, "heldout", 60):
        new = task.redeal(rng, "heldout", scene, question)
        pictures = task.paint(scene, 84), task.paint(new, 84)
        boxes = task.evidence(scene, question, 84), task.evidence(new, question, 84)
        assert not _outside(_changed(*pictures), *boxes)
        colour = palette.RGB[scene.colours[question.target]]
        heights = [(picture == colour).all(2).any(1).sum() for picture in pictures]
        values = [int(task.answer(s, question)) for s in (scene, new)]
        assert heights[0] / values[0] == pytest.approx(heights[1] / values[1], abs=1.01)
        for picture, box in zip(pictures, boxes, strict=True):
            assert not _outside((picture == colour).all(2), box)


def test_count_box_is_tight_around_the_counted_shapes():
    task = Counting()
    empty = 0
    for scene, (question,), _ in scenes(task, "heldout", 80):
        counted = scene.cells(question.target)
        assert task.answer(scene, question) == str(len(counted))
        without = tuple(None if cell in counted else thing for cell, thing in enumerate(scene.things))
        changed = _changed(task.paint(scene, 84), task.paint(dataclasses.replace(scene, things=without), 84))
        box = task.evidence(scene, question, 84)
        if counted:
            assert not _outside(changed, box)
            x1, y1, x2, y2 = map(int, box)
            y, x = np.nonzero(changed)
            assert max(y.min() - y1, x.min() - x1, y2 - y.max(), x2 - x.max()) <= 3
        else:
            empty += 1
            assert box == (0, 0, 84, 84)
    assert empty


def test_counted_shapes_are_in_the_picture():
    """Shapes of a colour, counted again as separate spots of that colour."""
    task = Counting(ask=("colour",))
    for scene, (question,), _ in scenes(task, "train", 40):
        colour = palette.RGB[question.target[1]]
        spots = (task.paint(scene, 168) == colour).all(2)
        cells = spots.reshape(3, 56, 3, 56).any((1, 3))
        assert str(cells.sum()) == task.answer(scene, question)


def test_receipt_box_is_the_printed_answer():
    task = Receipt()
    for scene, asked, rng in scenes(task, "heldout", 30, count=4):
        picture = task.paint(scene, 224)
        for question in asked:
            x1, y1, x2, y2 = map(int, task.evidence(scene, question, 224))
            ink = picture[y1:y2, x1:x2].min(2) < 200
            for answer_size in range(7, 22):
                mask = canvas.text(task.answer(scene, question), answer_size, question.target[0] in ("shop", "total"))
                mask = mask[mask.any(1)]
                if mask.shape == ink.shape:
                    break
            assert mask.shape == ink.shape
            assert np.corrcoef(mask.ravel(), 255 - picture[y1:y2, x1:x2].mean(2).ravel())[0, 1] > 0.99
            if question.target[0] in ("shop", "quantity"):
                new = task.redeal(rng, "heldout", scene, question)
                boxes = task.evidence(scene, question, 224), task.evidence(new, question, 224)
                assert not _outside(_changed(picture, task.paint(new, 224)), *boxes)


def test_receipt_sums_are_right():
    for scene, _, _ in scenes(Receipt(), "train", 40):
        assert scene.subtotal == sum(line.cents for line in scene.lines)
        assert scene.total == scene.subtotal + scene.tax
        assert scene.notes >= scene.total
        assert len({line.item for line in scene.lines}) == len({line.cents for line in scene.lines}) == len(scene.lines)


def test_the_cells_of_a_wider_frame_stand_anywhere_on_it():
    corners = set()
    for scene, (question,), _ in scenes(DigitMosaic(frame=4), "train", 300):
        left, top, right, bottom = DigitMosaic(frame=4).evidence(scene, question, 112)
        assert (right - left, bottom - top) == (28, 28) and left % 28 == top % 28 == 0
        corners.add((left, top))
    assert len(corners) == 16


NEW = [
    pytest.param(Scatter(clutter=6), 112, id="scatter"),
    pytest.param(Scatter(max_objects=30, kinds=4, grid=6, size=0.7, writing="handwritten"), 168, id="scatter-30"),
    pytest.param(LongReceipt(room=20, letters=2, digits=2, other_numbers=1), 280, id="long_receipt"),
    pytest.param(Album(max_grid=3), 84, id="album"),
]


@pytest.mark.parametrize(("task", "image_size"), NEW)
def test_only_the_evidence_of_the_asked_picture_changes(task, image_size):
    for scene, asked, rng in scenes(task, "heldout", 40, count=2):
        for question in asked:
            new = task.redeal(rng, "heldout", scene, question)
            box = task.evidence(scene, question, image_size)
            assert box == task.evidence(new, question, image_size)
            for number, (a, b) in enumerate(_pairs(task, scene, new, image_size)):
                changed = _changed(a, b)
                assert changed.any() == (number == question.picture)
                assert not _outside(changed, box)


def test_the_asked_thing_is_the_only_one_of_its_shape_and_colour():
    task = Scatter(min_objects=20, max_objects=30, kinds=4, grid=6)
    for scene, (question,), _ in scenes(task, "train", 30):
        *_, colour, kind = question.text.rstrip("?").split()
        (target,) = (
            number
            for number, thing in enumerate(scene.things)
            if (palette.NAMES[thing.colour], shapes.KINDS[thing.kind]) == (colour, kind)
        )
        assert question.target == (target,)
        x1, y1, x2, y2 = map(int, task.evidence(scene, question, 168))
        part = task.paint(scene, 168)[y1:y2, x1:x2]
        assert (part == palette.RGB[scene.things[target].colour]).all(2).mean() > 0.2
        assert (part == palette.INK).all(2).mean() > 0.02


def test_a_line_has_the_asked_code_and_the_price():
    task, height = LongReceipt(room=20, letters=2, digits=3), 320
    size = round(height / 20 * 0.8 / 0.73)
    for scene, (question,), _ in scenes(task, "train", 20):
        code = question.text.rstrip("?").split()[-1]
        x1, y1, x2, y2 = map(int, task.evidence(scene, question, height))
        line = 255 - task.paint(scene, height)[y1:y2, x1:x2].mean(2)
        for words, at in ((code, slice(None, 60)), (task.answer(scene, question), slice(-60, None))):
            ink = canvas.text(words, size)
            ink = ink[ink.any(1)]
            seen = line[:, at] > 60
            rows, columns = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
            found = line[:, at][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert abs(found.shape[0] - ink.shape[0]) <= 2 and abs(found.shape[1] - ink.shape[1]) <= 2


def test_pictures_of_an_album_have_letters_and_the_colours_of_the_first():
    source = Synthetic((Album(),), "heldout", image_size=56, questions_per_image=1).build()
    seen = set()
    for index in range(40):
        sample = source[index]
        parts = sample.messages[0]["content"]
        letters = [part["text"] for part in parts[:-1] if part["type"] == "text"]
        assert letters == ["A:", "B:", "C:", "D:"][: len(sample.images)]
        assert [part["type"] for part in parts] == ["text", "image"] * len(sample.images) + ["text"]
        asked = parts[-1]["text"].rstrip("?").split()[-1]
        assert "ABCD".index(asked) == sample.evidence_image
        colours = [{tuple(picture[y, x]) for y in (0, 28) for x in (0, 28)} for picture in sample.images]
        assert all(found == colours[0] for found in colours) and len(colours[0]) == 4
        seen.add((len(sample.images), sample.evidence_image))
    assert len(seen) >= 7


@pytest.mark.parametrize("task", [Scatter(ask="all"), LongReceipt(ask="all"), Album(ask="all")])
def test_lists_name_everything_once_with_its_answer_right_behind(task):
    one = dataclasses.replace(task, ask="one")
    for scene, (question,), _ in scenes(task, "train", 20):
        listed = task.answer(scene, question)
        _, asked = one.draw(np.random.default_rng(0), "train", 1)
        assert asked[0].text != question.text
        if isinstance(task, LongReceipt):
            expected = {f"{code}{price}" for code, price in zip(scene.codes, scene.prices, strict=True)}
            assert set(listed.split()) == expected and len(listed.split()) == len(scene.codes)
        elif isinstance(task, Scatter):
            expected = {(shapes.KINDS[t.kind], f"{palette.NAMES[t.colour]}{t.digit}") for t in scene.things}
            words = listed.split()
            assert set(zip(words[::2], words[1::2], strict=True)) == expected and len(words) == 2 * len(expected)
        else:
            digits = [word for word in listed.split() if len(word) > 1]
            assert len(digits) == sum(len(mosaic.colours) for mosaic in scene)
            assert [word for word in listed.split() if len(word) == 1] == list("ABCD"[: len(scene)])
