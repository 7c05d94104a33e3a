from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.config import ConfigError
from rave_jax.families import family_for, family_named
from rave_jax.families.llava_onevision import presets
from rave_jax.families.llava_onevision.config import AnyresConfig
from tests.families.test_families import released

FAMILY = family_named("llava_onevision")
SMALL = tiny_config(Tiny(family="llava_onevision"))


@pytest.mark.parametrize("size", ["0.5b", "7b"])
def test_presets_are_the_released_configs(shared_data: Path, size: str) -> None:
    hf = released(shared_data, f"llava-onevision-qwen2-{size}-ov-hf")
    assert getattr(presets, f"llava_onevision_{size.replace('.', '_')}")() == family_for(hf).parse(hf)


def test_a_rendered_config_parses_to_itself() -> None:
    """But for the mean and deviation of pixels, which the processor's file says."""
    plain = {name: getattr(AnyresConfig(), name) for name in ("pixel_mean", "pixel_std")}
    vision = dataclasses.replace(SMALL.vision, **plain)
    towers = vision, dataclasses.replace(vision, feature_layers=(0, 2), most_tiles=4)
    for config in (*(dataclasses.replace(SMALL, vision=one) for one in towers), presets.llava_onevision_7b()):
        assert FAMILY.parse(json.loads(json.dumps(FAMILY.render(config)))) == config


def test_sizes_of_tiles_that_a_config_leaves_out() -> None:
    hf = FAMILY.render(presets.llava_onevision_7b())
    del hf["image_grid_pinpoints"], hf["vision_aspect_ratio"], hf["image_token_index"]
    assert FAMILY.parse(hf) == presets.llava_onevision_7b()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": None}, "'vision_config' is missing"),
        (
            {"vision_config": {"model_type": "clip_vision_model"}},
            "'model_type' is 'clip_vision_model', expected 'sig",
        ),
        ({"text_config": {"model_type": "qwen3"}}, "text_config: 'model_type' is 'qwen3', expected 'qwen2' or 'llama'"),
        (
            {"vision_feature_select_strategy": "default"},
            "'vision_feature_select_strategy' is 'default', expected",
        ),
        ({"vision_aspect_ratio": "pad"}, "'vision_aspect_ratio' is 'pad', expected 'anyres_max_9' or another number"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "'vision_aspect_ratio' is 'anyres_max_0'"),
        ({"image_grid_pinpoints": []}, r"'image_grid_pinpoints' is \[\], expected a list of \[height, width\]"),
        ({"image_grid_pinpoints": [[42, 43]]}, "each a multiple of the tower's image_size 42"),
        ({"use_image_newline_parameter": False}, "'use_image_newline_parameter' is False, expected True"),
        ({"video_token_index": -1}, "'video_token_index' is -1, expected an integer from 0"),
    ],
)
def test_what_we_do_not_compute_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(FAMILY.render(SMALL) | change)


def test_its_tower_is_siglip_and_its_tiles_are_whole() -> None:
    with pytest.raises(ConfigError, match="kind is 'clip', expected siglip"):
        dataclasses.replace(SMALL.vision, kind="clip")
    with pytest.raises(ConfigError, match=r"pinpoints is .*, expected pairs of multiples of image_size 42"):
        dataclasses.replace(SMALL.vision, pinpoints=((42, 63),))
