"""Pictures are read as they are meant, and errors say what is wrong with which file."""

from __future__ import annotations

import base64
import io
import os
import re
import socket
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from PIL import Image

from rave_jax.data.images import cut_image, image_grid, image_size, read_image
from rave_jax.data.processor import Processor
from rave_jax.data.sample import ImageError
from rave_jax.data.video import cut_video
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.families.shared.grids.pictures import Pictures
from tests.data.pictures import noise

RULES = Pictures(qwen2_5_vl_7b())


def test_count_from_the_header_alone(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    image = Image.fromarray(noise(50, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    path.write_bytes(path.read_bytes()[:700])  # the pixels are gone, the header stands
    assert image_size(path) == (90, 50)
    image.save(path, exif=exif)
    found = cut_image(path, processor.rules)
    assert processor.count_tokens(*image_size(path)) == len(found.order)
    assert processor.need({"type": "image", "image": path}) == (len(found.order), found.patches.length)
    assert image_grid(path, processor.rules) == processor.rules.image_grid(90, 50) == found.grid


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
        ("https://example.org/a.png", r"^https://example\.org/a\.png: a URL.*not downloaded"),
        ("", "^: the path of a picture is empty"),
        ("file://", "the path of a picture is empty"),
        ("a\0b", "null"),
        ("a\nb.png", r"^'a\\nb\.png': No such file"),
        ("iVBORw0KGgo" * 500, "too long for a path; write base64"),
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
            cut_video([str(tmp_path / name)], None, RULES, "film")


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
        cut_image(path, RULES)
    with pytest.raises(ImageError, match=r"thin\.png.*1000 x 2"):
        image_grid(path, RULES)


def test_too_thin_a_size_is_not_counted(processor: Processor) -> None:
    with pytest.raises(ImageError, match=r"^1000 x 2 pixels: the sides must be within a factor of 200"):
        processor.count_tokens(2, 1000)


def test_a_channel_that_hides_nothing_changes_nothing() -> None:
    """Laying such a picture over white is left out; it would give its own pixels."""
    pixels = np.dstack([noise(40, 50), np.full((40, 50), 255, np.uint8)])
    laid = Image.alpha_composite(Image.new("RGBA", (50, 40), (255, 255, 255, 255)), Image.fromarray(pixels))
    np.testing.assert_array_equal(np.asarray(read_image(pixels)), np.asarray(laid)[..., :3])
    pixels[0, 0, 3] = 0
    np.testing.assert_array_equal(np.asarray(read_image(pixels))[0, 0], (255, 255, 255))


def test_a_picture_in_memory_is_not_handed_on_itself() -> None:
    given = Image.fromarray(noise(4, 4))
    read_image(given).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(given), noise(4, 4))
