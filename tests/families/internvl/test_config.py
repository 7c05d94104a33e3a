"""InternVL's config as transformers writes and reads it, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig
from rave_jax.families.internvl import FAMILY, presets
from rave_jax.families.internvl.config import VisionConfig
from rave_jax.models.config import ModelOptions
from tests.families.test_families import abstract, assert_one_to_one

SMALL = tiny_config(Tiny(family="internvl"))
LARGE_TOWER: dict[str, Any] = {"norm": "rms_norm", "qk_norm": True, "qkv_bias": False, "positions": False}


def with_tower(**changes: Any) -> VlmConfig:
    assert isinstance(SMALL.vision, VisionConfig)
    return replace(SMALL, vision=replace(SMALL.vision, **changes))


@pytest.mark.parametrize("config", [SMALL, with_tower(**LARGE_TOWER), with_tower(last_norm=True, merge_size=1)])
def test_a_config_comes_back_from_us_and_from_transformers(config: VlmConfig) -> None:
    from transformers import InternVLConfig

    rendered = json.loads(json.dumps(FAMILY.render(config)))
    assert FAMILY.parse(rendered) == config
    saved = json.loads(InternVLConfig(**rendered).to_json_string())
    assert FAMILY.parse(saved) == config


@pytest.mark.parametrize("config", [with_tower(**LARGE_TOWER), with_tower(last_norm=True)])
def test_tensors_of_each_kind_of_tower_are_its_parameters(config: VlmConfig) -> None:
    assert_one_to_one(abstract(config, ModelOptions()), FAMILY.tensors(config))


def test_the_config_of_a_released_model() -> None:
    """As the `-hf` checkpoints state it: most of the tower is the default of the class."""
    text = {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1e6,
        "sliding_window": None,
        "vocab_size": 151674,
        "eos_token_id": 151645,
    }
    config = FAMILY.parse({"model_type": "internvl", "text_config": text, "vision_config": {"attention_bias": True}})
    assert config == presets.internvl3_1b()
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    assert (vision.depth, vision.hidden_size, vision.side, vision.token_side) == (24, 1024, 32, 16)
    assert config.patch_sizes[:3] == (3 * 14 * 14, 4, 1024)
    assert (config.image_token_id, config.eos_token_ids, config.text.longest) == (151667, (151645,), 32768)
    assert not config.text.tie_embeddings


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        (presets.internvl3_1b, 938_193_024),
        (presets.internvl3_2b, 2_088_957_440),
        (presets.internvl3_8b, 7_944_373_760),
    ],
)
def test_presets_have_the_parameters_of_the_releases(preset: Callable[[], VlmConfig], parameters: int) -> None:
    """Counted by others: in the -hf checkpoint of 1B once loaded, in the header of 2B's original, and in the headers of
    two fine-tuned 8B."""
    assert_one_to_one(abstract(preset(), ModelOptions()), FAMILY.tensors(preset()))
    assert sum(math.prod(rule.shape) for rule in FAMILY.tensors(preset())) == parameters


def test_the_tensors_of_1b_are_those_of_the_released_file() -> None:
    """`model.safetensors` of InternVL3-1B-hf has 733 tensors and 1,876,478,048 bytes, of which the header, with every
    key, shape and place, takes 92,000: as many as one with our keys takes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for rule in sorted(FAMILY.tensors(presets.internvl3_1b()), key=lambda rule: rule.hf_key):
        start, stop = stop, stop + 2 * math.prod(rule.shape)
        header[rule.hf_key] = {"dtype": "BF16", "shape": rule.shape, "data_offsets": [start, stop]}
    written = len(json.dumps(header, separators=(",", ":")))
    assert len(header) - 1 == 733
    assert 8 + math.ceil(written / 8) * 8 == 92_000
    assert stop + 92_000 == 1_876_478_048


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_the_head_is_tied_where_transformers_ties_it(top: bool, inner: bool) -> None:
    from transformers import InternVLConfig

    hf = json.loads(json.dumps(FAMILY.render(SMALL)))
    hf["text_config"]["tie_word_embeddings"] = inner
    hf["tie_word_embeddings"] = top
    assert FAMILY.parse(hf).text.tie_embeddings is InternVLConfig(**hf).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": None}, "config.json: 'vision_config' is missing"),
        ({"vision_feature_layer": -2}, "'vision_feature_layer' is -2, expected -1"),
        ({"vision_feature_select_strategy": "full"}, "'vision_feature_select_strategy' is 'full', expected 'default'"),
        ({"projector_hidden_act": "relu"}, "'projector_hidden_act' is 'relu', expected 'gelu' or"),
        ({"downsample_ratio": 0.3}, "'downsample_ratio' is 0.3, expected 1 divided by a whole number"),
        ({"image_seq_length": 7}, "'image_seq_length' is 7, expected 4: the visual tokens of a tile"),
        ({"text_config": {"model_type": "internlm2"}}, "text_config: 'model_type' is 'internlm2', expected 'qwen2'"),
    ],
)
def test_what_we_do_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(FAMILY.render(SMALL) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_mask_token": True}, "'use_mask_token' is True, expected False"),
        ({"norm_type": "batch_norm"}, "'norm_type' is 'batch_norm', expected 'layer_norm' or 'rms_norm'"),
        ({"hidden_act": "silu"}, "'hidden_act' is 'silu', expected 'gelu' or"),
        ({"image_size": [56, 112]}, r"'image_size' is \[56, 112\], expected a number, or the same one twice"),
        ({"patch_size": [15, 15]}, "image_size is 56, expected whole merge units of 2 patches of 15 pixels"),
        ({"use_mean_pooling": "no"}, "'use_mean_pooling' is 'no', expected true or false"),
    ],
)
def test_a_tower_that_we_do_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    hf = FAMILY.render(SMALL)
    hf["vision_config"] |= change
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(hf)
