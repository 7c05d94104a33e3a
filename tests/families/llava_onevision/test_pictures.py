"""Tiles are those of transformers' processor; what visual tokens are sums of is what torch's interpolation does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rave_jax.batch import Kind
from rave_jax.checkpoint.tiny import Tiny, tiny_config, write_tiny_files
from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.survey import measure
from rave_jax.families.config import tower_of
from rave_jax.families.directory import picture_rules
from rave_jax.families.llava_onevision import anyres
from rave_jax.families.llava_onevision.config import AnyresConfig
from rave_jax.families.llava_onevision.pictures import Pictures
from rave_jax.families.llava_onevision.presets import llava_onevision_7b
from tests.data.pictures import noise

TINY = Tiny(family="llava_onevision", patch_size=7)
TILE = 21
SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))
REAL = tower_of(llava_onevision_7b(), AnyresConfig)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_files(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def rules(directory: Path) -> Pictures:
    found = picture_rules(directory)
    assert isinstance(found, Pictures)
    return found


@given(SIZES, st.booleans())
def test_tiles_are_those_of_transformers(directory: Path, rules: Pictures, size: tuple[int, int], alone: bool) -> None:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    image = Image.fromarray(noise(*size))
    theirs = LlavaOnevisionImageProcessorPil.from_pretrained(directory)
    images = [image] if alone else [image, image]
    expected = np.asarray(theirs([images], return_tensors="np")["pixel_values"][0])
    cut = rules.among(len(images)).cut_image(image)
    pixels = cut.patches.pixels.reshape(-1, 3, 3, 3, 7, 7).transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, TILE, TILE)
    np.testing.assert_allclose(pixels / 127.5 - 1, expected, atol=1e-5)
    assert cut.patches.length == rules.count_patches(cut.grid) == 9 * len(expected)
    assert set(cut.patches.window) == {1} and cut.patches.frame.max() == len(expected)


@given(st.tuples(st.integers(1, 4000), st.integers(1, 4000)))
def test_visual_tokens_of_released_sizes_are_counted_as_transformers_does(size: tuple[int, int]) -> None:
    """`_get_number_of_features` of its processor, for tiles of 27 x 27 units."""
    form = anyres.tiled(*size, REAL.pinpoints, REAL.image_size, REAL.side, REAL.most_tiles)
    height, width = size
    down, across = form.rows * 27, form.cols * 27
    if width / height > across / down:
        down -= (down - int(round(height * (across / width), 7))) // 2 * 2
    else:
        across -= (across - int(round(width * (down / height), 7))) // 2 * 2
    ratio = math.sqrt(down * across / (9 * 27**2))
    kept = (int(down // ratio), int(across // ratio)) if ratio > 1.1 else (down, across)
    assert form.kept == kept
    mixes = anyres.picture_mixes(form, 27)
    assert len(mixes.source) == 729 + kept[0] * (kept[1] + 1)
    assert mixes.source.max() < 729 * (1 + form.rows * form.cols)
    np.testing.assert_allclose(mixes.weight.sum(axis=1), 1, atol=1e-6)


def test_a_line_ends_with_the_learned_row() -> None:
    """Of a picture twice as wide as high in two tiles of 2 x 2 units, nothing is interpolated or left out."""
    form = anyres.Tiled(1, 2, 2, 4, (2, 4))
    mixes = anyres.picture_mixes(form, 2)
    lines = [4, 5, 8, 9, anyres.NEWLINE, 6, 7, 10, 11, anyres.NEWLINE]
    np.testing.assert_array_equal(mixes.source[:, 0], [0, 1, 2, 3, *lines])
    np.testing.assert_array_equal(mixes.weight[:, 0], 1)
    assert (mixes.source[:, 1:] >= 0).all(), "a learned row is known by its first source alone"


def test_frames_are_halved() -> None:
    """Of 3 x 3 units 2 x 2 are kept: places 0.25 and 1.75 of each side."""
    mixes = anyres.video_mixes(2, 3)
    assert len(mixes.source) == 2 * 4 + 1
    np.testing.assert_array_equal(mixes.source[4], np.array([0, 1, 3, 4]) + 9)
    np.testing.assert_allclose(mixes.weight[4], [0.5625, 0.1875, 0.1875, 0.0625])
    np.testing.assert_allclose(mixes.weight[7], [0.0625, 0.1875, 0.1875, 0.5625])
    assert mixes.source[-1, 0] == anyres.NEWLINE


def test_one_picture_is_tiled_and_several_are_not(directory: Path) -> None:
    processor = Processor.from_hf(directory)
    image = {"type": "image", "image": noise(60, 63)}
    video = {"type": "video", "video": [noise(30, 40)] * 3}

    def grids(*parts: dict) -> tuple[list[tuple[int, int]], int]:
        talk = [{"role": "user", "content": [*parts, {"type": "text", "text": "a"}]}]
        example = processor.encode(talk)
        assert measure(processor, talk) == (len(example.tokens), example.patches.length)
        info = example.info
        visual = info.kind == Kind.VISUAL
        np.testing.assert_array_equal(example.visual_index[visual], np.arange(visual.sum()))
        firsts = [np.flatnonzero(info.image == n)[0] for n in range(1, info.image.max() + 1)]
        return [(int(info.grid_t[n] * info.grid_h[n]), int(info.grid_w[n])) for n in firsts], example.patches.length

    assert grids(image) == ([(3, 3), (4, 5)], 9 * 10)
    assert grids(image, image) == ([(3, 3), (1, 1)] * 2, 9 * 2)
    assert grids(image, video) == ([(3, 3), (4, 5), (6, 2), (1, 1)], 9 * 13)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[21, 21]]},
            "image_grid_pinpoints are .*, expected",
        ),
        ("preprocessor_config.json", {"size": {"height": 20, "width": 21}}, "size is .*, expected 21 x 21"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop is True, expected False"),
        ("video_preprocessor_config.json", {"do_sample_frames": True}, "do_sample_frames is True, expected False"),
        ("video_preprocessor_config.json", {"image_mean": [0, 0, 0]}, r"image_mean is \[0, 0, 0\], expected \[0.5"),
    ],
)
def test_processing_that_is_not_done_is_refused(tmp_path: Path, file: str, change: dict, message: str) -> None:
    write_tiny_files(tmp_path, TINY)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
    with pytest.raises(ConfigError, match=f"{file}: {message}"):
        picture_rules(tmp_path)


def test_limits_of_pixels_are_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="max_pixels is 100, expected null: the sizes of pictures are those"):
        Processor.from_hf(directory, max_pixels=100)
    assert tiny_config(TINY).patch_sizes.spread == 10
