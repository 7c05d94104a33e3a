"""Greys of more than 8 bits and float greys: scaled by their range, never cut off; 8 bits stay as Pillow has them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rave_jax.data import grey
from rave_jax.data.images import read_image
from rave_jax.data.sample import ImageError

RAMP = np.arange(256).reshape(16, 16)


def as_file(pixels: np.ndarray, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize(
    ("pixels", "kind", "expected"),
    [
        ((RAMP * 257).astype(np.uint16), "PNG", RAMP),
        ((RAMP * 257).astype(np.uint16), "TIFF", RAMP),
        (np.rint(RAMP * 4095 / 255).astype(np.uint16), "TIFF", RAMP),
        (np.full((16, 16), 32896, np.uint16), "PNG", np.full((16, 16), 128)),
        ((RAMP * 257).astype(np.int32), "TIFF", RAMP),
        ((RAMP / 255).astype(np.float32), "TIFF", RAMP),
        ((RAMP * 257).astype(np.float32), "TIFF", RAMP),
        ((RAMP * 10 - 1000).astype(np.float32), "TIFF", RAMP),
        ((RAMP * 10_000_000 - 1_000_000_000).astype(np.int32), "TIFF", RAMP),
        (np.full((16, 16), -5, np.float32), "TIFF", 0 * RAMP),
        # 8 bits in a wider type: as they are.
        (RAMP.astype(np.uint16), "PNG", RAMP),
        (RAMP.astype(np.int32), "TIFF", RAMP),
        (RAMP.astype(np.float32), "TIFF", RAMP),
    ],
)
def test_values_are_scaled_by_the_range_they_stand_in(pixels: np.ndarray, kind: str, expected: np.ndarray) -> None:
    expected = np.repeat(expected[..., None], 3, -1)
    np.testing.assert_array_equal(np.asarray(read_image(as_file(pixels, kind))), expected)
    np.testing.assert_array_equal(np.asarray(read_image(Image.fromarray(pixels))), expected)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_byte_orders(mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (16, 16), (RAMP * 257).astype(order).tobytes())
    np.testing.assert_array_equal(np.asarray(read_image(image))[..., 1], RAMP)


def test_a_transparent_grey_is_white() -> None:
    pixels = (RAMP * 257).astype(np.uint16)
    seen = np.asarray(read_image(as_file(pixels, "PNG", transparency=257 * 7)))[..., 0]
    np.testing.assert_array_equal(seen, np.where(RAMP == 7, 255, RAMP))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_is_refused(value: float) -> None:
    pixels = RAMP.astype(np.float32)
    pixels[3, 4] = value
    with pytest.raises(ImageError, match=r"scan\.tif: 1 of its pixels are NaN or infinite"):
        read_image(as_file(pixels, "TIFF"), "scan.tif")


def test_each_kind_of_scaling_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(grey, "_remarked", set())
    for name, factor in (("a.png", 257), ("b.png", 257), ("c.png", 16), ("d.png", 1)):
        read_image(Image.fromarray((RAMP * factor).astype(np.uint16)), name)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a.png", "c.png"]
    assert "0 to 65535" in lines[0] and "0 to 4095" in lines[1]
