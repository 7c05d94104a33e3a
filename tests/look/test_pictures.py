"""Pictures are PNG files that show what they say: the box where it belongs, heat where attention was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from rave_jax.look.curves import save_loss_curve, smooth
from rave_jax.look.overlay import BOX, Caption, blend, heat_image, save_overlay

CAPTION = Caption("How much is $5 and $7? " * 9, "12", "a prediction " * 20, 0.0, "a note")


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
    heat = np.ones((4, 6))
    save_overlay(tmp_path / "with.png", image, heat, (0.5, 0.0, 1.0, 0.5), CAPTION)
    save_overlay(tmp_path / "without.png", image, heat, None, CAPTION)
    with_box, without = drawn(tmp_path / "with.png"), drawn(tmp_path / "without.png")
    assert with_box.shape == without.shape
    assert len(box_pixels(without)) == 0
    places = box_pixels(with_box)
    half = with_box.shape[1] // 2
    panel = with_box.shape[1] * 3.6 / 7.8
    for left in (0, half):
        columns = places[(places[:, 1] >= left) & (places[:, 1] < left + half), 1]
        assert len(columns) > 100
        # The box spans the right half of the panel, which starts 0.2 inches in.
        start = left + with_box.shape[1] * 0.2 / 7.8
        assert columns.min() == pytest.approx(start + panel / 2, abs=4)
        assert columns.max() == pytest.approx(start + panel, abs=4)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(400, 20), (20, 400), (1, 1)])
def test_any_picture_can_be_drawn(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    save_overlay(tmp_path / "a.png", Image.new(mode, size), np.zeros((1, 1)), (0, 0, 1, 1), Caption("", "", "", 1.0))
    assert drawn(tmp_path / "a.png").size > 0


def test_a_map_is_resized_onto_the_picture() -> None:
    heat = np.zeros((3, 3))
    heat[0, 2] = 0.2
    blocks = heat_image(heat, width=60, height=30)
    assert blocks.shape == (30, 60)
    assert (blocks[:10, 40:] == 1).all() and blocks.sum() == 200
    fine = heat_image(np.eye(12), width=240, height=240)
    assert fine[30, 30] > 0.9 and fine[30, 200] < 0.05


def test_heat_is_strongest_where_attention_was() -> None:
    heat = np.array([[0.0, 1.0]])
    mixed = blend(Image.new("RGB", (40, 20), (128, 128, 128)), heat)
    assert mixed[:, 20:].mean() > mixed[:, :20].mean() + 0.1
    assert np.ptp(mixed[:, 20:], axis=-1).min() > 0.2, "heat has a colour"


def test_loss_curve(tmp_path: Path) -> None:
    assert smooth(np.array([4.0, 2.0, 0.0, 1.0]), 2).tolist() == [4.0, 3.0, 1.0, 0.5]
    assert smooth(np.array([3.0, 1.0]), 1).tolist() == [3.0, 1.0]
    save_loss_curve(tmp_path / "loss.png", [1, 2, 3], [3.0, 2.0, 1.0], 2)
    save_loss_curve(tmp_path / "again.png", [1, 2, 3], [3.0, 2.0, 1.0], 2)
    assert drawn(tmp_path / "loss.png").std() > 0
    assert (tmp_path / "loss.png").read_bytes() == (tmp_path / "again.png").read_bytes()
