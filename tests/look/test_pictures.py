"""Pictures show what they say: the box where it belongs, and attention on one scale, on which even is even."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from rave_jax.look.curves import save_loss_curve, smooth
from rave_jax.look.overlay import BOX, GAP, PANEL, Caption, blend, on_picture, save_heads, save_overlay, strength

CAPTION = Caption("How much is $5 and $7? " * 9, "12", "a prediction " * 20, 0.0, "a note")
EVEN = np.ones((4, 6))


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.verify()
    return np.asarray(Image.open(path).convert("RGB"), np.float32)


def box_pixels(picture: np.ndarray) -> np.ndarray:
    """Places (row, column) of pixels in the box's colour."""
    return np.argwhere(np.abs(picture - 255 * np.array(to_rgb(BOX))).max(-1) < 12)


def test_the_box_is_drawn_in_both_panels(tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 60), (250, 240, 230))
    save_overlay(tmp_path / "with.png", image, EVEN, (0.5, 0.0, 1.0, 0.5), CAPTION)
    save_overlay(tmp_path / "without.png", image, EVEN, None, CAPTION)
    with_box, without = drawn(tmp_path / "with.png"), drawn(tmp_path / "without.png")
    assert with_box.shape == without.shape
    assert len(box_pixels(without)) == 0
    places = box_pixels(with_box)
    inch = 110
    for panel in (0, 1):
        # The box spans the right half of the panel.
        left = (GAP + panel * (PANEL + GAP)) * inch
        mine = places[(places[:, 1] >= left - 5) & (places[:, 1] < left + PANEL * inch + 5), 1]
        assert len(mine) > 100
        assert (mine.min(), mine.max()) == pytest.approx((left + PANEL * inch / 2, left + PANEL * inch), abs=4)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(400, 20), (20, 400), (1, 1)])
def test_any_picture_can_be_drawn(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    save_overlay(tmp_path / "a.png", Image.new(mode, size), np.zeros((1, 1)), (0, 0, 1, 1), Caption("", "", "", 1.0))
    assert drawn(tmp_path / "a.png").size > 0


def test_cells_are_blocks_whatever_the_grid() -> None:
    for cells in (3, 12):
        values = np.zeros((cells, cells))
        values[0, -1] = 1.0
        blocks = on_picture(values, width=20 * cells, height=10 * cells)
        assert blocks.shape == (10 * cells, 20 * cells)
        assert (blocks[:10, -20:] == 1).all() and blocks.sum() == 200


def test_the_scale_is_of_even_attention_and_of_nothing_else() -> None:
    """1 is the middle; what is beyond the ends has their colours; the other cells of a map do not matter."""
    values = np.array([[0.0, 1 / 16, 1 / 8, 1.0, 2.0, 8.0, 500.0]])
    assert strength(values) == pytest.approx(np.array([[-1, -1, -1, 0, 1 / 3, 1, 1]]))
    image = Image.new("RGB", (40, 20), (128, 128, 128))
    sharp, flat = blend(image, np.array([[2.0, 100.0]])), blend(image, np.array([[2.0, 0.9]]))
    np.testing.assert_array_equal(sharp[:, :20], flat[:, :20])
    even = blend(image, EVEN)
    assert np.ptp(even, axis=-1).max() < 1e-6, "even attention has no colour"
    assert (sharp[:, 20:, 0] > sharp[:, 20:, 2] + 0.2).all(), "more is red"
    less = blend(image, np.array([[0.2, 1.8]]))
    assert (less[:, :20, 2] > less[:, :20, 0] + 0.2).all(), "less is blue"


def test_the_colour_bar_is_the_same_beside_any_map(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 60), (200, 200, 200))
    for name, values in (("even", EVEN), ("sharp", np.array([[0.0, 0.0], [0.0, 4.0]]))):
        save_overlay(tmp_path / f"{name}.png", image, values, None, Caption("", "", "", 1.0))
    even, sharp = drawn(tmp_path / "even.png"), drawn(tmp_path / "sharp.png")
    bar = slice(round(2 * (PANEL + GAP) * 110), None)
    np.testing.assert_array_equal(even[60:, bar], sharp[60:, bar])
    inside = even[:, round((2 * (PANEL + GAP) + GAP + 0.08) * 110)]
    assert (inside[:, 0] - inside[:, 2]).max() > 80 and (inside[:, 2] - inside[:, 0]).max() > 80


@pytest.mark.parametrize("heads", [1, 12])
def test_every_head_is_drawn(heads: int, tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), (200, 200, 200))
    maps = np.ones((heads, 4, 6))
    save_heads(tmp_path / "a.png", image, maps, np.full(heads, 0.5), (0.0, 0.0, 1.0, 1.0))
    maps[-1, :, :3] = 4.0
    save_heads(tmp_path / "b.png", image, maps, np.full(heads, 0.5), (0.0, 0.0, 1.0, 1.0))
    one, other = drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png")
    changed = np.argwhere(np.abs(one - other).max(-1) > 20)
    assert len(changed) > 1000
    assert np.ptp(changed, axis=0).max() < 1.6 * 110, "only the last head's panel"


def test_pictures_for_print(tmp_path: Path) -> None:
    """The same figure as PDF and SVG, the same bytes each time."""
    image = Image.new("RGB", (60, 60), (200, 200, 200))
    for suffix, start in (("pdf", b"%PDF-"), ("svg", b"<?xml")):
        files = [tmp_path / f"{name}.{suffix}" for name in ("a", "b")]
        for file in files:
            save_overlay(file, image, EVEN, (0, 0, 1, 1), CAPTION)
        one, two = (file.read_bytes() for file in files)
        assert one == two and one.startswith(start)


def test_loss_curve(tmp_path: Path) -> None:
    assert smooth(np.array([4.0, 2.0, 0.0, 1.0]), 2).tolist() == [4.0, 3.0, 1.0, 0.5]
    assert smooth(np.array([3.0, 1.0]), 1).tolist() == [3.0, 1.0]
    save_loss_curve(tmp_path / "loss.png", [1, 2, 3], [3.0, 2.0, 1.0], 2)
    save_loss_curve(tmp_path / "again.png", [1, 2, 3], [3.0, 2.0, 1.0], 2)
    assert drawn(tmp_path / "loss.png").std() > 0
    assert (tmp_path / "loss.png").read_bytes() == (tmp_path / "again.png").read_bytes()
