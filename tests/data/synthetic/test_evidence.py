"""The evidence box holds what carries the answer, and dealing it anew changes the answer and little else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rave_jax.data.synthetic import BarChart, Counting, DigitMosaic, PositionMosaic, Receipt, Synthetic, canvas, palette
from rave_jax.data.synthetic.base import SPLITS
from rave_jax.evaluation.metrics import score
from tests.data.synthetic.cases import TASKS, scenes


def _outside(changed, *boxes):
    """Whether a pixel outside all the boxes is set."""
    rest = changed.copy()
    for x1, y1, x2, y2 in boxes:
        rest[int(y1) : int(y2), int(x1) : int(x2)] = False
    return rest.any()


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
        changed = _changed(task.paint(scene, image_size), task.paint(new, image_size))
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
        assert not np.array_equal(sample.images[0], redealt.images[0])


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
