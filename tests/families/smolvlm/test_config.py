"""SmolVLM's config as released and as transformers writes it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.config import ConfigError
from rave_jax.families import family_for
from rave_jax.families.directory import processor_files
from rave_jax.families.smolvlm import FAMILY, presets
from rave_jax.families.smolvlm.pictures import Pictures, pictures
from rave_jax.families.smolvlm.video import VideoLimits
from rave_jax.models.config import ModelOptions
from tests.families.test_families import abstract, assert_one_to_one, released

SMALL = tiny_config(Tiny(family="smolvlm"))


def test_the_preset_is_the_released_config(shared_data: Path) -> None:
    hf = released(shared_data, "smolvlm2-500m-video-instruct")
    assert family_for(hf) is FAMILY and FAMILY.parse(hf) == presets.smolvlm2_500m()
    assert_one_to_one(abstract(presets.smolvlm2_500m(), ModelOptions()), FAMILY.tensors(presets.smolvlm2_500m()))


def test_the_released_processor(shared_data: Path) -> None:
    """A large picture becomes 4 x 4 tiles of 64 visual tokens and the whole."""
    folder = shared_data / "configs" / "smolvlm2-500m-video-instruct"
    rules = pictures(presets.smolvlm2_500m(), processor_files(folder))
    assert rules == Pictures(presets.smolvlm2_500m(), 2048, True, VideoLimits(1.0, 64, 2048))
    assert rules.image_grid(3000, 3000) == (17, 8, 8)
    assert rules.image_grid(600, 900).tiles == (3, 4)


def test_a_config_comes_back_from_us_and_from_transformers() -> None:
    from transformers import SmolVLMConfig

    rendered = json.loads(json.dumps(FAMILY.render(SMALL)))
    assert FAMILY.parse(rendered) == SMALL
    assert FAMILY.parse(json.loads(SmolVLMConfig(**rendered).to_json_string())) == SMALL


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("inner", [True, False])
def test_the_head_is_tied_where_transformers_ties_it(top: bool | None, inner: bool) -> None:
    from transformers import SmolVLMConfig

    hf = json.loads(json.dumps(FAMILY.render(SMALL)))
    hf["text_config"]["tie_word_embeddings"] = inner
    hf |= {"tie_word_embeddings": top}
    if top is None:
        del hf["tie_word_embeddings"]
    assert FAMILY.parse(hf).text.tie_embeddings is SmolVLMConfig(**hf).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": None}, "config.json: 'vision_config' is missing"),
        ({"scale_factor": 3}, "image_size is 56, expected whole merge units of 3 patches of 14 pixels"),
        ({"scale_factor": 0}, "'scale_factor' is 0, expected an integer from 1"),
        ({"text_config": {"model_type": "qwen2"}}, "text_config: 'model_type' is 'qwen2', expected 'llama'"),
        ({"image_token_id": "<image>"}, "'image_token_id' is '<image>', expected an integer"),
        (
            {"vision_config": {"model_type": "idefics3_vision"}},
            "'model_type' is 'idefics3_vision', expected",
        ),
        (
            {"vision_config": {"hidden_act": "relu"}},
            "vision_config: 'hidden_act' is 'relu', expected 'gelu_py",
        ),
    ],
)
def test_what_we_do_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(FAMILY.render(SMALL) | change)
