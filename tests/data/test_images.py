"""Pictures to patches: equal to transformers' PIL processor, window by window, and clear about broken files."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import normalize, rescale
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rave_jax.data.images import (
    CutPicture,
    PatchGrid,
    count_tokens,
    image_patches,
    image_size,
    read_image,
    smart_resize,
    window_order,
)
from rave_jax.data.processor import Processor
from rave_jax.data.sample import ImageError
from rave_jax.data.video import VideoLimits, video_patches
from tests.data.pictures import noise

GRID = PatchGrid(patch=14, temporal=2, merge=2, window=4)


def hf_values(cut: CutPicture, grid: PatchGrid, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD) -> np.ndarray:
    """Our bytes in transformers' patch order, scaled and normalised by transformers' own functions."""
    units = len(cut.order)
    raster = cut.patches.pixels.reshape(units, -1)[cut.order].reshape(units * grid.merge**2, 3, -1)
    planes = normalize(rescale(np.moveaxis(raster, 1, 0), 1 / 255), mean, std, input_data_format="channels_first")
    return np.moveaxis(planes, 0, 1).reshape(len(raster), -1)


def theirs(image, low: int, high: int, **settings) -> tuple[np.ndarray, list[int]]:
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high}, **settings)
    out = processor(images=[image])
    return np.asarray(out["pixel_values"]), np.asarray(out["image_grid_thw"])[0].tolist()


def assert_equal(image, low: int = 28 * 28, high: int = 28 * 28 * 20) -> None:
    ours = image_patches(image, GRID, low, high)
    values, (t, rows, cols) = theirs(image, low, high)
    assert ours.grid == (t, rows // 2, cols // 2)
    np.testing.assert_array_equal(hf_values(ours, GRID), values)


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
        image_patches(pixels, GRID, 784, 15680).patches.pixels, image_patches(image, GRID, 784, 15680).patches.pixels
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
        grid = PatchGrid(patch, 2, 2, 112 // (2 * patch))
        image = Image.open(shared_data / case["image"]).convert("RGB")
        ours = image_patches(image, grid, low, high)
        assert [[1, ours.grid[1] * 2, ours.grid[2] * 2]] == case["grid_thw"]
        values = hf_values(ours, grid, config["image_mean"], config["image_std"])
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
    grid = PatchGrid(patch=2, temporal=2, merge=2, window=3)
    pixels = np.zeros((rows * 4, cols * 4, 3), np.uint8)
    pixels[..., 0] = np.arange(rows * 4)[:, None] // 2
    pixels[..., 1] = np.arange(cols * 4)[None] // 2
    cut = image_patches(pixels, grid, 16, 10**6)
    patches = cut.patches
    channels = patches.pixels.reshape(-1, 3, 2 * 2 * 2)
    np.testing.assert_array_equal(channels[:, 0, 0], patches.place[:, 0])
    np.testing.assert_array_equal(channels[:, 1, 0], patches.place[:, 1])
    units = patches.place.reshape(-1, 4, 2)[:, 0] // 2
    np.testing.assert_array_equal(units[cut.order], np.moveaxis(np.indices((rows, cols)), 0, -1).reshape(-1, 2))
    assert (np.diff(patches.window) >= 0).all()
    assert set(patches.frame) == {1}


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_smart_resize_keeps_its_promises(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ImageError, match="within a factor of 200"):
            smart_resize(height, width, 28, 3136, 10**6)
        return
    rows, cols = smart_resize(height, width, 28, 3136, 10**6)
    assert rows % 28 == cols % 28 == 0
    assert rows * cols >= 3136
    assert rows * cols <= 10**6 or min(rows, cols) == 28


def test_count_from_the_header_alone(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    image = Image.fromarray(noise(50, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    path.write_bytes(path.read_bytes()[:700])  # the pixels are gone, the header stands
    assert image_size(path) == (90, 50)
    image.save(path, exif=exif)
    s = processor.settings
    cut = image_patches(path, s.grid, s.min_pixels, s.max_pixels)
    assert processor.count_tokens(*image_size(path)) == len(cut.order)
    assert count_tokens(90, 50, s.grid, s.min_pixels, s.max_pixels) == len(cut.order)


def test_orientation_of_files_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(noise(20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "turned.png")), upright)
    np.testing.assert_array_equal(np.asarray(read_image((tmp_path / "turned.png").read_bytes())), upright)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(file, "JPEG")
    return file.getvalue()


def gif() -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(noise(8, 8, seed=n)) for n in range(3)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def tiff(pages: int) -> bytes:
    file = io.BytesIO()
    first, *rest = (Image.fromarray(noise(8, 8, seed=n)) for n in range(pages))
    first.save(file, "TIFF", save_all=True, append_images=rest)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (jpeg()[: len(jpeg()) // 2], "truncated"),
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "this is a web page"),
        (tiff(2), "a TIFF of 2 pages; save its pages as separate pictures"),
        (b"not a picture", "cannot identify"),
        (gif(), "animation"),
        (jpeg()[:30], "broken.bin"),
    ],
)
def test_broken_files_are_one_error_with_their_name(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=says) as error:
        read_image(str(path))
    assert str(path) in str(error.value)
    with pytest.raises(ImageError, match=r"train\.parquet:7"):
        read_image(content, "train.parquet:7")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.png", r"^nowhere\.png: No such file"),
        ("https://example.org/a.png", r"^https://example\.org/a\.png: an address on the net.*not downloaded"),
        ("", "^: the path of a picture is empty"),
        ("file://", "the path of a picture is empty"),
        ("a\0b", "null"),
        ("a\nb.png", r"^'a\\nb\.png': No such file"),
        ("iVBORw0KGgo" * 500, "too long for a path; base64"),
        ("data:image/png;base64,", "holds no bytes"),
        ("data:image/png;base64,A", "base64 of its data URI is broken"),
        ("data:image/png", "without a comma"),
        ("data:text/plain,hello", "cannot identify"),
        (7, "int in memory: int: expected a path"),
        (None, "NoneType"),
        (np.zeros((4, 4, 3)), "array of float64"),
        (np.zeros((4, 4, 2), np.uint8), "expected uint8"),
    ],
)
def test_what_is_no_picture(source, says: str) -> None:
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=says) as error:
            read(source)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A named pipe and a terminal would be waited on for ever."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    kinds = {"pipe": "named pipe", "link": "named pipe", "socket": "socket", ".": "directory", "/dev/zero": "device"}
    for name, kind in kinds.items():
        with pytest.raises(ImageError, match=f"{re.escape(name)}: it is a {kind}"):
            read_image(str(tmp_path / name) if name != "." else ".")
        with pytest.raises(ImageError, match=f"frame 0: it is a {kind}"):
            video_patches([str(tmp_path / name)], None, GRID, VideoLimits(), "film")


def test_data_uris_and_links_are_the_picture(tmp_path: Path) -> None:
    content = jpeg()
    (tmp_path / "a.jpg").write_bytes(content)
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    code = base64.b64encode(content).decode()
    wrapped = "\n".join(code[n : n + 76] for n in range(0, len(code), 76))
    uris = [f"data:image/jpeg;base64,{code}", f"DATA:;base64,{wrapped}", f"data:image/jpeg,{quote_from_bytes(content)}"]
    for source in (content, tmp_path / "link.jpg", f"file://{tmp_path}/a.jpg", *uris):
        np.testing.assert_array_equal(np.asarray(read_image(source)), np.asarray(Image.open(tmp_path / "a.jpg")))
        assert image_size(source) == (64, 64)


def test_too_thin_a_picture_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "thin.png"
    Image.new("RGB", (1000, 2)).save(path)
    with pytest.raises(ImageError, match=r"thin\.png.*1000 x 2"):
        image_patches(path, GRID, 3136, 10**6)
