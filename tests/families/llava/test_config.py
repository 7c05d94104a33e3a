from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.config import ConfigError
from rave_jax.families import family_for, family_named
from rave_jax.families.config import VlmConfig
from rave_jax.families.llava import presets
from rave_jax.families.shared.vit import VitConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import is_unused, named_parameters
from rave_jax.models.vlm import Vlm
from tests.families.test_families import assert_one_to_one, released

FAMILY = family_named("llava")
SMALL = tiny_config(Tiny(family="llava", vision_layers=4))


def changed(**tower: object) -> VlmConfig:
    """The small model with another tower."""
    return dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, **tower))


def model_of(config: VlmConfig) -> Vlm:
    return jax.eval_shape(lambda: Vlm(config, ModelOptions(), key=jax.random.key(0)))


def test_the_preset_is_the_released_config(shared_data: Path) -> None:
    hf = released(shared_data, "llava-1.5-7b-hf")
    assert presets.llava_1_5_7b() == family_for(hf).parse(hf)


CONFIGS = (
    SMALL,
    presets.llava_1_5_13b(),
    changed(feature_layers=(1, 3, 4), class_feature=True, projector_bias=False),
    changed(kind="siglip", activation="gelu_pytorch_tanh", layer_norm_eps=1e-6, feature_layers=(4,)),
)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_rendered_config_parses_to_itself(config: VlmConfig) -> None:
    assert FAMILY.parse(json.loads(json.dumps(FAMILY.render(config)))) == config


@pytest.mark.parametrize("config", [config for config in CONFIGS if config.text.num_layers < 10])
def test_each_tensor_is_one_parameter_in_every_style_of_keys(config: VlmConfig) -> None:
    rules = FAMILY.tensors(config)
    assert_one_to_one(model_of(config), rules)
    keys = [rule.hf_key for rule in rules]
    for style in range(len(FAMILY.styles)):
        named = [FAMILY.other_key(key, style) for key in keys]
        assert [FAMILY.canonical_key(key) for key in named] == keys
        assert [FAMILY.other_key(key, FAMILY.style_of(named)) for key in keys] == named


def test_the_styles_are_those_that_transformers_has_written() -> None:
    key = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert [FAMILY.other_key(key, n) for n in range(4)] == [
        key,
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
        f"model.{key}",
    ]
    assert [FAMILY.other_key("language_model.lm_head.weight", n) for n in range(4)] == [
        "language_model.lm_head.weight",
        "lm_head.weight",
        "language_model.lm_head.weight",
        "lm_head.weight",
    ]


def test_blocks_behind_the_last_that_is_read_are_marked() -> None:
    """They have their parameters, which nothing is computed with and no training changes."""
    params = named_parameters(model_of(changed(feature_layers=(1, 2))))
    unused = {name for name, param in params.items() if is_unused(param)}
    runs = {name.split(".")[2] for name in unused if "layer_runs" in name}
    assert runs == {"2"}, "runs are blocks 0, 1 and 2 to 3"
    assert {name for name in unused if "layer_runs" not in name} == {"vision.post_norm.weight", "vision.post_norm.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text_config": {"model_type": "mistral"}},
            "text_config: 'model_type' is 'mistral', expected 'llama' or",
        ),
        ({"text_config": {"model_type": "llama", "hidden_act": "gelu"}}, "text_config: 'hidden_act' is 'gelu'"),
        ({"vision_config": None}, "'vision_config' is missing"),
        (
            {"vision_config": {"model_type": "pixtral"}},
            "vision_config: 'model_type' is 'pixtral', expected 'clip_",
        ),
        ({"vision_config": {"hidden_size": 8}}, "vision_config: 'model_type' is missing"),
        ({"vision_feature_layer": -7}, "'vision_feature_layer' is -7, expected an integer from -5 to 4, or a list"),
        ({"vision_feature_layer": []}, r"'vision_feature_layer' is \[\], expected an integer"),
        ({"vision_feature_select_strategy": "cls"}, "'vision_feature_select_strategy' is 'cls', expected 'default' or"),
        ({"projector_hidden_act": "relu"}, "'projector_hidden_act' is 'relu', expected 'gelu'"),
        ({"image_token_index": "<image>"}, "'image_token_index' is '<image>', expected an integer"),
    ],
)
def test_what_we_do_not_compute_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(FAMILY.render(SMALL) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_use_head": True}, "'vision_use_head' is True, expected False: the pooling head"),
        ({"hidden_act": "relu"}, "vision_config: 'hidden_act' is 'relu'"),
        ({}, "'vision_feature_select_strategy' is 'default', which leaves out the first token"),
    ],
)
def test_siglip_has_no_class_token_and_no_head(change: dict, message: str) -> None:
    hf = FAMILY.render(CONFIGS[3]) | {"vision_feature_select_strategy": "default"}
    with pytest.raises(ConfigError, match=message):
        FAMILY.parse(hf | {"vision_config": hf["vision_config"] | change})


def test_a_tower_without_a_class_token_cannot_give_it() -> None:
    with pytest.raises(ConfigError, match="class_feature is True, expected false: siglip has no class token"):
        VitConfig(kind="siglip", class_feature=True)
