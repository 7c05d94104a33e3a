"""Pictures to patches: equal to transformers' PIL processor, window by window."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import normalize, rescale
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rave_jax.data.images import cut_image
from rave_jax.families.pictures import CutPicture, PictureError
from rave_jax.families.qwen2_5_vl.config import VisionConfig
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.families.shared.grids.images import smart_resize, window_order
from rave_jax.families.shared.grids.pictures import Pictures
from tests.data.pictures import noise

CONFIG = qwen2_5_vl_7b()
VISION = CONFIG.vision


def rules(low: int, high: int, vision: VisionConfig = VISION) -> Pictures:
    return Pictures(replace(CONFIG, vision=vision), low, high)


def hf_values(cut: CutPicture, vision: VisionConfig = VISION, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD) -> np.ndarray:
    """Our bytes in transformers' patch order, scaled and normalised by transformers' own functions."""
    units = len(cut.order)
    raster = cut.patches.pixels.reshape(units, -1)[cut.order].reshape(units * vision.merge_unit, 3, -1)
    planes = normalize(rescale(np.moveaxis(raster, 1, 0), 1 / 255), mean, std, input_data_format="channels_first")
    return np.moveaxis(planes, 0, 1).reshape(len(raster), -1)


def theirs(image, low: int, high: int, **settings) -> tuple[np.ndarray, list[int]]:
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high}, **settings)
    out = processor(images=[image])
    return np.asarray(out["pixel_values"]), np.asarray(out["image_grid_thw"])[0].tolist()


def assert_equal(image, low: int = 28 * 28, high: int = 28 * 28 * 20) -> None:
    ours = cut_image(image, rules(low, high))
    values, (t, rows, cols) = theirs(image, low, high)
    assert ours.grid == (t, rows // 2, cols // 2)
    np.testing.assert_array_equal(hf_values(ours), values)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 3))
def test_equals_transformers_on_odd_sizes(height: int, width: int, limits: int) -> None:
    if max(height, width) > 200 * min(height, width):
        height = width
    low, high = [(784, 15680), (3136, 12845056), (784, 784), (50176, 100352)][limits]
    assert_equal(Image.fromarray(noise(height, width)), low, high)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "F"])
def test_equals_transformers_on_every_mode(mode: str) -> None:
    image = Image.fromarray(noise(45, 70, 4), "RGBA")
    image = (
        image.convert("L").convert(mode) if mode in ("I;16", "F") else image.convert("RGB" if mode == "PA" else "RGBA")
    )
    assert_equal(image.convert(mode) if mode not in ("LA", "PA") else image.convert("RGBA").convert(mode))


def test_equals_transformers_on_palette_with_transparency() -> None:
    image = Image.fromarray(noise(40, 40)).quantize(16)
    image.info["transparency"] = 3
    assert_equal(image)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays(channels: int) -> None:
    pixels = noise(30, 50, channels)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    np.testing.assert_array_equal(
        cut_image(pixels, rules(784, 15680)).patches.pixels, cut_image(image, rules(784, 15680)).patches.pixels
    )


def test_equals_golden_file(shared_data: Path) -> None:
    golden = json.loads((shared_data / "preprocess_golden/qwen_image_processor.json").read_text())
    checked = 0
    for case in golden["cases"]:
        config = json.loads((shared_data / "configs" / case["config"] / "preprocessor_config.json").read_text())
        limits = case["override"] or {}
        size = config.get("size", {})
        low = limits.get("min_pixels") or config.get("min_pixels") or size["shortest_edge"]
        high = limits.get("max_pixels") or config.get("max_pixels") or size["longest_edge"]
        patch = config["patch_size"]
        vision = replace(VISION, patch_size=patch)
        image = Image.open(shared_data / case["image"]).convert("RGB")
        ours = cut_image(image, rules(low, high, vision))
        assert [[1, ours.grid[1] * 2, ours.grid[2] * 2]] == case["grid_thw"]
        values = hf_values(ours, vision, config["image_mean"], config["image_std"])
        assert list(values.shape) == case["shape"]
        np.testing.assert_allclose(values.reshape(-1)[case["idx"]], case["values"], atol=1e-6)
        np.testing.assert_allclose([values.mean(), values.std()], [case["mean"], case["std"]], atol=1e-5)
        checked += 1
    assert checked == len(golden["cases"]) > 0


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8))
def test_windows_tile_the_grid(rows: int, cols: int, window: int) -> None:
    order, index = window_order(rows, cols, window)
    expected: list[tuple[int, int]] = []
    number = 0
    for top in range(0, rows, window):
        for left in range(0, cols, window):
            for row in range(top, min(top + window, rows)):
                expected += [(row * cols + col, number) for col in range(left, min(left + window, cols))]
            number += 1
    assert list(zip(order.tolist(), index.tolist(), strict=True)) == expected


@given(st.integers(1, 9), st.integers(1, 9))
def test_place_and_order_agree_with_pixels(rows: int, cols: int) -> None:
    vision = replace(VISION, patch_size=2, window_size=12)
    pixels = np.zeros((rows * 4, cols * 4, 3), np.uint8)
    pixels[..., 0] = np.arange(rows * 4)[:, None] // 2
    pixels[..., 1] = np.arange(cols * 4)[None] // 2
    found = cut_image(pixels, rules(16, 10**6, vision))
    patches = found.patches
    channels = patches.pixels.reshape(-1, 3, 2 * 2 * 2)
    np.testing.assert_array_equal(channels[:, 0, 0], patches.place[:, 0])
    np.testing.assert_array_equal(channels[:, 1, 0], patches.place[:, 1])
    units = patches.place.reshape(-1, 4, 2)[:, 0] // 2
    np.testing.assert_array_equal(units[found.order], np.moveaxis(np.indices((rows, cols)), 0, -1).reshape(-1, 2))
    assert (np.diff(patches.window) >= 0).all()
    assert set(patches.frame) == {1}


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_smart_resize_keeps_its_promises(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(PictureError, match="within a factor of 200"):
            smart_resize(height, width, 28, 3136, 10**6)
        return
    rows, cols = smart_resize(height, width, 28, 3136, 10**6)
    assert rows % 28 == cols % 28 == 0
    assert rows * cols >= 3136
    assert rows * cols <= 10**6 or min(rows, cols) == 28
