"""Pixels equal those of transformers' processors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rave_jax.batch import Kind
from rave_jax.checkpoint.tiny import Tiny, write_tiny_files
from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.survey import measure
from rave_jax.families.directory import picture_rules
from rave_jax.families.llava.pictures import Pictures
from rave_jax.layout import ContextTokens, VisualLayout
from tests.data.pictures import noise

SIDE = 56
SIZES = ((97, 143), (301, 55), (40, 61), (56, 56), (57, 900), (20, 20))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_tiny_files(tmp_path, Tiny(family="llava"))
    return tmp_path


def with_processor(directory: Path, **change: object) -> Path:
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return directory


def rules_of(directory: Path) -> Pictures:
    rules = picture_rules(directory)
    assert isinstance(rules, Pictures)
    return rules


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("clip", {}),
        ("clip", {"size": SIDE, "crop_size": SIDE}),
        ("clip", {"size": {"shortest_edge": 40}}),
        ("llava", {"do_pad": True}),
        ("llava", {"do_pad": False}),
        ("siglip", {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": None, "crop_size": None}),
    ],
)
def test_pixels_are_those_of_transformers(directory: Path, kind: str, change: dict) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    classes = {"clip": CLIPImageProcessorPil, "llava": LlavaImageProcessorPil, "siglip": SiglipImageProcessorPil}
    rules = rules_of(with_processor(directory, image_processor_type=classes[kind].__name__, **change))
    theirs = classes[kind].from_pretrained(directory)
    mean, std = (np.asarray(getattr(rules.vision, name)) for name in ("pixel_mean", "pixel_std"))
    for height, width in SIZES:
        image = Image.fromarray(noise(height, width))
        expected = np.asarray(theirs(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
        np.testing.assert_allclose((rules.resized(image) / 255 - mean) / std, expected, atol=1e-5)


def test_patches_stand_row_by_row_behind_the_class_token(directory: Path) -> None:
    rules = rules_of(directory)
    image = Image.fromarray(noise(70, 56))
    cut, pixels = rules.cut_image(image), rules.resized(image)
    assert cut.grid == rules.image_grid(70, 56) == (1, 4, 4)
    assert cut.patches.length == rules.count_patches(cut.grid) == 17
    np.testing.assert_array_equal(cut.order, np.arange(16))
    np.testing.assert_array_equal(cut.patches.source[:, 0], np.arange(1, 17))
    np.testing.assert_array_equal(cut.patches.place[[0, 1, 2, 16]], [[-1, -1], [0, 0], [0, 1], [3, 3]])
    assert not cut.patches.pixels[0].any()
    np.testing.assert_array_equal(cut.patches.pixels[7].reshape(3, 14, 14), pixels[14:28, 28:42].transpose(2, 0, 1))


@pytest.mark.parametrize("full", [False, True])
def test_a_placeholder_becomes_the_tokens_of_a_picture(directory: Path, full: bool) -> None:
    file = directory / "config.json"
    strategy = {"vision_feature_select_strategy": "full" if full else "default"}
    file.write_text(json.dumps(json.loads(file.read_text()) | strategy))
    processor = Processor.from_hf(directory)
    image = {"type": "image", "image": noise(20, 30)}
    talk = [{"role": "user", "content": [image, image, {"type": "text", "text": "a"}]}]
    example = processor.encode(talk)
    visual = example.info.kind == Kind.VISUAL
    assert visual.sum() == (34 if full else 32)
    np.testing.assert_array_equal(example.visual_index[visual], np.arange(visual.sum()))
    chosen = np.concatenate([np.arange(1, 17), np.arange(18, 34)])
    np.testing.assert_array_equal(example.patches.source.reshape(-1), [] if full else chosen)
    assert measure(processor, talk) == (len(example.tokens), example.patches.length) == (len(example.tokens), 34)
    assert processor.tokenizer.decode(example.tokens[:1]) == "<s>"
    np.testing.assert_array_equal(example.positions, np.tile(np.arange(len(example.tokens)), (3, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 1}, r"resample is 1, expected 3 \(bicubic\) or 2 \(bilinear\)"),
        ({"do_normalize": False}, "do_normalize is False, expected True"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False, expected True"),
        ({"rescale_factor": 1}, "rescale_factor is 1, expected 1/255"),
        (
            {"crop_size": {"height": 28, "width": 28}},
            "crop_size is .*, expected 56 x 56, the image_size of",
        ),
        ({"do_center_crop": False}, "do_center_crop is False, expected True where size is the shortest edge alone"),
        ({"size": {"shortest_edge": "56"}}, "size is .*, expected {'shortest_edge': a number of pixels"),
        ({"size": {"height": 60, "width": 56}}, "size is .*, expected that of crop_size .*: pictures are not"),
        ({"crop_size": {"height": 28}}, "crop_size is .*, expected {'height': pixels, 'width': pixels}"),
    ],
)
def test_processing_that_is_not_done_is_refused(directory: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: {message}"):
        rules_of(with_processor(directory, **change))


@pytest.mark.parametrize("pads", [True, False])
def test_tokens_that_show_more_border_than_picture_say_so(directory: Path, pads: bool) -> None:
    """As many as there are patches of which more than half has the colour of the border; context tokens are none."""
    folder = with_processor(directory, image_processor_type="LlavaImageProcessor", do_pad=pads)
    rules = rules_of(folder)
    processor = Processor.from_hf(folder, layout=VisualLayout(context=ContextTokens(1)))
    images = [np.full((*size, 3), 255, np.uint8) for size in ((20, 56), (56, 30), (5, 56), (56, 56))]
    example = processor.encode([{"role": "user", "content": [{"type": "image", "image": image} for image in images]}])
    expected = []
    for image in images:
        cells = rules.resized(Image.fromarray(image)).reshape(4, 14, 4, 14, 3).min(-1) < 200
        expected.append(cells.mean((1, 3)).ravel() > 0.5)
    visual = example.info.kind == Kind.VISUAL
    np.testing.assert_array_equal(example.info.padded[visual], np.concatenate(expected))
    assert not example.info.padded[~visual].any() and example.info.padded.any() == pads


def test_thin_pictures_and_videos_are_refused(directory: Path) -> None:
    processor = Processor.from_hf(directory)
    for part, message in (
        ({"type": "image", "image": noise(2, 500)}, "500 x 2 pixels: the sides must be within a factor of 200"),
        ({"type": "video", "video": [noise(9, 9)], "fps": 1.0}, "the model takes no videos"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.encode([{"role": "user", "content": [part]}])
