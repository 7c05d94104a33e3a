"""Pictures to tiles: equal to transformers' PIL processor, tile by tile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from rave_jax.checkpoint.tiny import Tiny, tiny_config, token_ids, write_tiny_files
from rave_jax.config import ConfigError
from rave_jax.data.images import cut_image
from rave_jax.data.processor import Processor
from rave_jax.data.sample import OverBudget
from rave_jax.families.internvl import FAMILY
from rave_jax.families.internvl.config import VisionConfig
from rave_jax.families.internvl.pictures import Pictures, pictures
from rave_jax.families.pictures import CutPicture, PictureError, ProcessorFiles
from tests.data.pictures import noise

SIZES = Tiny(family="internvl", patch_size=6, merge_size=2)
CONFIG = tiny_config(SIZES)
VISION = CONFIG.vision
assert isinstance(VISION, VisionConfig)
SIDE = VISION.image_size


def planes(cut: CutPicture, vision: VisionConfig) -> np.ndarray:
    """Our bytes as tiles [N,3,H,W], normalised."""
    units, merge, p = vision.token_side, vision.merge_size, vision.patch_size
    cells = cut.patches.pixels.reshape(-1, units, units, merge, merge, 3, p, p)
    tiles = cells.transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, vision.image_size, vision.image_size)
    mean, std = (np.asarray(x, np.float64).reshape(3, 1, 1) for x in (vision.pixel_mean, vision.pixel_std))
    return (tiles / 255 - mean) / std


@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([(1, 12), (1, 1), (2, 6), (3, 4)]))
def test_equals_transformers_on_odd_sizes(height: int, width: int, limits: tuple[int, int]) -> None:
    image = Image.fromarray(noise(height, width))
    ours = cut_image(image, Pictures(CONFIG, *limits))
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=limits[0], max_patches=limits[1]
    )
    theirs = processor(images=[image])
    values = np.stack(theirs["pixel_values"])
    assert ours.grid == Pictures(CONFIG, *limits).image_grid(height, width) == (len(values), 2, 2)
    np.testing.assert_allclose(planes(ours, VISION), values, atol=1e-5)


def test_patches_of_a_unit_stand_together() -> None:
    """A patch's place says where in its tile its pixels were, and its frame which tile that is."""
    picture = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    picture[..., 0] = np.arange(SIDE)[:, None]
    picture[..., 1] = np.arange(2 * SIDE)
    cut = cut_image(picture, Pictures(CONFIG))
    assert cut.grid == (3, 2, 2)
    frame, place = cut.patches.frame, cut.patches.place
    np.testing.assert_array_equal(frame, np.repeat([1, 2, 3], 16))
    np.testing.assert_array_equal(place[:8], [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]])
    first = cut.patches.pixels.reshape(-1, 3, 36)[:32, :, 0]
    np.testing.assert_array_equal(first[:, 0], place[:32, 0] * 6)
    np.testing.assert_array_equal(first[:, 1], place[:32, 1] * 6 + (frame[:32] - 1) * SIDE)
    np.testing.assert_array_equal(cut.order, np.arange(12))


@pytest.mark.parametrize("size", [(1, 201), (5000, 20)])
def test_stripes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match="within a factor of 200 of each other"):
        Pictures(CONFIG).image_grid(*size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 448, "width": 448}}, "size is .*, expected 24 x 24, the image_size of vision_config"),
        ({"size": {"shortest_edge": 24}}, "size is {'shortest_edge': 24}, expected"),
        ({"min_patches": 13}, "min_patches is 13, expected 1 to max_patches 12"),
        ({"max_patches": 10**6}, "max_patches is 1000000, expected a number from 1 to 1,024"),
        ({"max_patches": "12"}, "max_patches is '12', expected a number of tiles"),
        ({"resample": 2}, "resample is 2, expected 3"),
        ({"do_normalize": False}, "do_normalize is False, expected True"),
    ],
)
def test_other_processing_is_refused(change: dict[str, Any], message: str) -> None:
    stated = FAMILY.small.files(CONFIG, token_ids(FAMILY.small))["preprocessor_config.json"] | change
    file = Path("preprocessor_config.json")
    with pytest.raises(ConfigError, match=rf"^preprocessor_config.json: {message}"):
        pictures(CONFIG, ProcessorFiles(file, stated, file, stated))


def test_a_text_longer_than_the_model_computes_is_refused(tmp_path: Path) -> None:
    """InternVL3's RoPE is of type `dynamic`: beyond the longest text its frequencies would be others."""
    write_tiny_files(tmp_path, SIZES)
    config = (tmp_path / "config.json").read_text()
    scaled = config.replace('"rope_theta"', '"rope_scaling": {"type": "dynamic", "factor": 2.0},\n    "rope_theta"')
    scaled = scaled.replace('"max_position_embeddings": 32768', '"max_position_embeddings": 40')
    (tmp_path / "config.json").write_text(scaled)
    processor = Processor.from_hf(tmp_path)
    assert processor.rules.config == replace(
        CONFIG, text=replace(CONFIG.text, rope_scaling=processor.rules.config.text.rope_scaling, max_position=40)
    )
    message = {"role": "user", "content": "a" * 30}
    assert len(processor.encode([message]).tokens) <= 40
    with pytest.raises(OverBudget, match=r"\d+ tokens; the model's longest text is 40 \(RoPE of type 'dynamic'\)"):
        processor.encode([message, {"role": "assistant", "content": "b" * 30}])
