"""CARVE and Visual Funnel: the stated formulas by plain loops, and pictures whose right part is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from rave_jax.config import ConfigError
from rave_jax.look import carve, funnel
from rave_jax.look.carve import Carve
from rave_jax.look.funnel import VisualFunnel
from tests.data.pictures import noise

RNG = np.random.default_rng(0)


def filled(mask: np.ndarray) -> np.ndarray:
    """Parts by a flood from each pixel in turn."""
    number = np.zeros(mask.shape, int)
    for start in zip(*np.nonzero(mask), strict=True):
        if number[start]:
            continue
        part, todo = number.max() + 1, [start]
        while todo:
            y, x = todo.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not number[y, x]:
                number[y, x] = part
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return number


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.7, 1.0])
def test_parts_are_connected_by_their_sides(share: float) -> None:
    mask = RNG.random((23, 31)) < share
    found, wanted = carve.connected(mask), filled(mask)
    pairs = set(zip(found.ravel().tolist(), wanted.ravel().tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}), "one number for each part"
    assert (found == 0).tolist() == (~mask).tolist() and found.max() == wanted.max()


def test_the_contrast_is_the_stated_sum() -> None:
    how = Carve(layers=(0, 1), floor=0.01, steps=3)
    asked, general = RNG.random((2, 5, 3, 4)), RNG.random((2, 4, 3, 4))
    # At the size of the grid nothing is resized.
    total = carve.fused(how, asked, general, (4, 3))
    wanted = sum((t + 1) * asked[n, t] / (general[n, t] + 0.01) for t in range(3) for n in range(2))
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    large = carve.fused(how, asked, general, (40, 30))
    assert large.shape == (30, 40) and large.max() <= total.max() * 1.001


def test_what_is_looked_at_more_than_in_general_is_cut_out_and_enlarged() -> None:
    picture = Image.fromarray(noise(30, 40))
    asked, general = np.ones((1, 1, 6, 8)), np.ones((1, 1, 6, 8))
    asked[..., 1:3, 4:7] = 3.0
    general[..., 4:, :3] = 0.1
    asked[..., 4:, :3] = 0.1  # looked at little by both
    how = Carve(layers=(0,), fraction=0.1)
    mask = carve.kept(how, carve.fused(how, asked, general, picture.size))
    rows, columns = np.nonzero(mask)
    assert rows.min() >= 5 and rows.max() < 15 and columns.min() >= 20 and columns.max() < 35
    cut = carve.refined(picture, mask)
    assert cut is not None and cut.width >= picture.width and cut.height >= picture.height
    assert min(cut.width - picture.width, cut.height - picture.height) <= 1, "it just covers the picture"


def test_of_many_parts_those_with_the_largest_sum_stay() -> None:
    total = np.zeros((10, 50))
    for part in range(5):  # the narrow ones are stronger, the wide one has the largest sum
        total[2:4, 10 * part : 10 * part + 2] = 5 + part
    total[2:4, 40:49] = 4
    mask = carve.kept(Carve(layers=(0,), fraction=0.9, least=2), total - 1e-9 * (total == 0))
    assert mask.all(), "nothing stands out where nearly all stays"
    mask = carve.kept(Carve(layers=(0,), fraction=0.06, least=2), total)
    assert sorted(set(np.nonzero(mask)[1] // 10)) == [3, 4]


def test_a_narrow_strip_is_not_enlarged_beyond_all_bounds() -> None:
    mask = np.zeros((300, 400), bool)
    mask[7] = True
    cut = carve.refined(Image.fromarray(noise(300, 400)), mask)
    assert cut is not None and cut.width * cut.height <= 16 * 300 * 400
    assert cut.size == (27712, 69)


def test_nothing_is_cut_where_all_stays() -> None:
    picture = Image.fromarray(noise(6, 8))
    assert carve.refined(picture, carve.kept(Carve(fraction=1.0), RNG.random((6, 8)))) is None


def test_the_funnel_is_the_stated_boxes() -> None:
    how, size = VisualFunnel(base=60), (400, 300)
    heat = RNG.random((6, 8)) ** 6
    a = heat / heat.sum()
    H = -float(np.sum(a * np.log(a))) / math.log(48)
    assert funnel.entropy(a) == pytest.approx(H)
    middles = [((x + 0.5) * 50, (y + 0.5) * 50) for y in range(6) for x in range(8)]

    def square(box: tuple[float, ...] | None, side: float) -> tuple[int, ...]:
        inside = [
            (weight, at)
            for weight, at in zip(a.ravel(), middles, strict=True)
            if box is None or (box[0] <= at[0] < box[2] and box[1] <= at[1] < box[3])
        ]
        total = sum(weight for weight, _ in inside)
        corner = []
        for axis in (0, 1):
            centre = sum(weight * at[axis] for weight, at in inside) / total
            corner.append(min(max(centre - side / 2, 0), size[axis] - side))
        return tuple(round(x) for x in (*corner, corner[0] + side, corner[1] + side))

    focal = square(None, 60)
    near = square(focal, (1.2 + 0.6 * H) * 60)
    wide = square(near, (1.6 + 1.2 * H) * 60)
    assert funnel.boxes(how, heat, size) == {"focal": focal, "near": near, "wide": wide}


def test_the_surer_the_model_is_the_narrower_are_the_crops() -> None:
    size = (1000, 800)
    one, even = np.zeros((8, 10)), np.ones((8, 10))
    one[2, 3] = 1.0
    sure, unsure = (funnel.boxes(VisualFunnel(base=100), heat, size) for heat in (one, even))
    sides = [[box[2] - box[0] for box in found.values()] for found in (sure, unsure)]
    assert sides == [[100, 120, 160], [100, 180, 280]]
    assert sure["focal"] == (300, 200, 400, 300)
    assert funnel.boxes(VisualFunnel(), np.zeros((8, 10)), size) == funnel.boxes(VisualFunnel(), even, size)


def test_crops_stay_inside_a_picture_that_is_smaller() -> None:
    picture = Image.fromarray(noise(400, 30))
    heat = np.zeros((8, 2))
    heat[7, 1] = 1.0
    found = funnel.views(VisualFunnel(views=("focal", "whole", "wide")), heat, picture)
    assert [view.size for view in found] == [(30, 224), (30, 400), (30, 358)]
    np.testing.assert_array_equal(np.asarray(found[0]), np.asarray(picture)[-224:])
    assert found[1] is picture


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: VisualFunnel(where="{place}"), "where is .*expected a text whose only name in braces"),
        (lambda: VisualFunnel(where="{question.text}"), "where is .*expected a text whose only name in braces"),
        (lambda: VisualFunnel(views=()), "views is .*at least one view"),
        (lambda: VisualFunnel(near=(0.0, 1.0)), "near is"),
        (lambda: Carve(fraction=0.0), "fraction is 0.0, expected a number above 0, at most 1"),
        (lambda: Carve(layers=()), "layers is .*at least one layer"),
    ],
)
def test_bad_settings_are_refused_by_their_names(make, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()
