"""The files of image and video processors, of every family: what they state is computed, or refused by its name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rave_jax.checkpoint.tiny import Tiny, write_tiny_files
from rave_jax.config import ConfigError
from rave_jax.families import FAMILIES
from rave_jax.families.directory import picture_rules
from rave_jax.families.pictures import PictureRules
from tests.families.every import OTHER, SIZES, WITH_PICTURES

IMAGE, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
WRONG: tuple[Any, ...] = ("x", [], ["x"], {"x": 1}, -1, True, 1e400)
"""Values that no setting takes but those that are true or false."""
EVERY = ("rescale_factor", "resample", "size", "image_mean", "image_std")
FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
GRIDS = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")
SAMPLED = ("fps", "min_frames", "max_frames", "max_video_tokens")
QWEN = {
    IMAGE: (GRIDS, ()),
    VIDEO: (("min_pixels", "max_pixels", *SAMPLED), ("do_sample_frames", "cap_pixels_per_frame")),
}
QWEN3 = {IMAGE: (GRIDS, ()), VIDEO: (SAMPLED, ("do_sample_frames", "cap_pixels_per_frame"))}
OWN: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "qwen3_5": QWEN3,
    "llava": {IMAGE: (("crop_size",), ("do_center_crop", "do_pad"))},
    "llava_onevision": {
        IMAGE: (("image_grid_pinpoints",), ("do_center_crop",)),
        VIDEO: ((), ("do_center_crop", "do_sample_frames")),
    },
    "internvl": {IMAGE: (("min_patches", "max_patches"), ())},
    "smolvlm": {IMAGE: (("max_image_size",), ("do_image_splitting",))},
}
"""Settings of a family beside those of every one, by file: those of numbers and sizes, and those that are true or
false."""


@pytest.fixture(scope="module", params=WITH_PICTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family and the files of a small model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_files(folder, Tiny(**{**SIZES, **OTHER.get(request.param, {}), "family": request.param}))
    return request.param, folder


def rules(folder: Path, file: str = IMAGE, **change: Any) -> PictureRules:
    """The rules of a model whose file states something else."""
    path = folder / file
    before = path.read_text() if path.exists() else None
    path.write_text(json.dumps(json.loads(before or "{}") | change))
    try:
        return picture_rules(folder)
    finally:
        path.unlink() if before is None else path.write_text(before)


def test_a_setting_of_the_wrong_kind_is_refused_by_its_name(model: tuple[str, Path]) -> None:
    family, folder = model
    for file, (sizes, flags) in OWN[family].items():
        cases = [(key, wrong) for key in (*EVERY, *sizes) for wrong in WRONG]
        cases += [(key, wrong) for key in (*FLAGS, *flags) for wrong in WRONG if wrong is not True]
        for key, wrong in cases:
            with pytest.raises(ConfigError) as refused:
                rules(folder, file, **{key: wrong})
            said = str(refused.value).removeprefix(f"{folder}/")
            assert re.match(rf"{file}: {key}(\.\w+)? (is|are) ", said) and "expected" in said, (key, wrong, said)


def test_a_setting_that_is_null_is_the_one_that_is_absent(model: tuple[str, Path]) -> None:
    family, folder = model
    for file, (sizes, flags) in OWN[family].items():
        stated = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        null = {key: None for key in (*EVERY, *FLAGS, *sizes, *flags) if key not in stated}
        assert rules(folder, file, **null) == rules(folder, file, processor_class="Any")


def test_a_processor_of_another_name_is_refused(model: tuple[str, Path]) -> None:
    family, folder = model
    own, expected = FAMILIES[family], picture_rules(folder)
    for name in own.image_processors[:1]:
        for spelled in (name, f"{name}Fast", f"{name}Pil", None):
            assert rules(folder, image_processor_type=spelled) == expected
    for wrong in ("ViTImageProcessor", "Fast", ["x"], 1):
        with pytest.raises(
            ConfigError, match=f"{IMAGE}: image_processor_type is .*, expected {own.image_processors[0]!r}"
        ):
            rules(folder, image_processor_type=wrong)
    with pytest.raises(ConfigError, match=f"{IMAGE}: feature_extractor_type is 'ViTImageProcessor', expected "):
        rules(folder, image_processor_type=None, feature_extractor_type="ViTFeatureExtractor")


def test_a_video_processor_of_another_name_is_refused(model: tuple[str, Path]) -> None:
    family, folder = model
    own = FAMILIES[family]
    takes = type(picture_rules(folder)).cut_video is not PictureRules.cut_video
    assert bool(own.video_processors) == takes
    if takes:
        for name in own.video_processors:
            rules(folder, VIDEO, video_processor_type=name)
        with pytest.raises(ConfigError, match=f"{VIDEO}: video_processor_type is 'Other', expected "):
            rules(folder, VIDEO, video_processor_type="Other")
