from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest

from rave_jax.attention import CacheType, Rave, SlidingWindow
from rave_jax.config import ConfigError
from rave_jax.families import FAMILIES, family_for, family_named
from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.families.qwen3_vl.presets import qwen3_vl_8b
from rave_jax.families.qwen3_vl_moe.presets import qwen3_vl_30b_a3b
from rave_jax.models.config import FloatName, ModelOptions
from rave_jax.models.parameters import locate, named_parameters, num_bytes
from rave_jax.models.vlm import Vlm


def released(shared_data: Path, name: str) -> dict:
    return json.loads((shared_data / "configs" / name / "config.json").read_text())


def abstract(config: VlmConfig, options: ModelOptions) -> Vlm:
    return jax.eval_shape(lambda: Vlm(config, options, key=jax.random.key(0)))


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_presets_are_the_released_configs(shared_data: Path, size: str) -> None:
    hf = released(shared_data, f"qwen2.5-vl-{size}-instruct")
    assert getattr(presets, f"qwen2_5_vl_{size}")() == family_for(hf).parse(hf)


def test_the_7b_takes_the_published_bytes_and_keys(shared_data: Path) -> None:
    hf = released(shared_data, "qwen2.5-vl-7b-instruct")
    family = family_for(hf)
    config = family.parse(hf)
    model = abstract(config, ModelOptions(param_dtype="bfloat16"))
    index = json.loads((shared_data / "configs/qwen2.5-vl-7b-instruct/model.safetensors.index.json").read_text())
    assert num_bytes(model) == index["metadata"]["total_size"] == 16_584_333_312

    rules = family.tensors(config)
    keys = set(index["weight_map"])
    assert len(rules) == len(keys) == 729
    assert {rule.hf_key for rule in rules} == keys
    assert {family.other_key(key) for key in keys}.isdisjoint(keys - {"lm_head.weight"})
    assert {family.canonical_key(family.other_key(key)) for key in keys} == keys
    assert all(family.canonical_key(key) == key for key in keys)
    assert_one_to_one(model, rules)


def test_keys_find_their_layer_when_mechanisms_cut_the_stack() -> None:
    config = presets.tiny(num_layers=5)
    model = abstract(config, ModelOptions(mechanisms=(SlidingWindow(4, layers=(1, 2, 4)),)))
    assert [(s.start, s.stop) for s in model.decoder.layer_runs] == [(0, 1), (1, 3), (3, 4), (4, 5)]
    rules = family_named(config.family).tensors(config)
    assert_one_to_one(model, rules)
    third = next(rule for rule in rules if rule.hf_key == "model.layers.2.mlp.up_proj.weight")
    assert locate(model, third) == ("decoder.layer_runs.1.layers.mlp.up.weight", 1)


def assert_one_to_one(model: Vlm, rules) -> None:
    """Every tensor has its own place, of its own size, and together they fill every parameter."""
    params = named_parameters(model)
    places = [locate(model, rule) for rule in rules]
    parts = [(*place, rule.entry) for place, rule in zip(places, rules, strict=True)]
    assert len(set(parts)) == len(rules)
    filled: dict[str, int] = dict.fromkeys(params, 0)
    entries: dict[str, int] = dict.fromkeys(params, 1)
    for rule, (path, index) in zip(rules, places, strict=True):
        layers = params[path].shape[0] if index is not None else 1
        size = params[path].size // layers // (1 if rule.entry is None else params[path].shape[1])
        size *= 1 if rule.cut is None else rule.cut.count
        assert jax.numpy.zeros(rule.shape, jax.numpy.int8).size == size if size < 1000 else True
        entries[path] = 1 if rule.entry is None else params[path].shape[1]
        filled[path] += 1
        assert filled[path] <= layers * entries[path]
    stacked = {path: params[path].shape[0] if ".layers." in path else 1 for path in params}
    assert all(filled[path] == stacked[path] * entries[path] for path in params)


@pytest.mark.parametrize("config", [presets.tiny(), presets.tiny(tie_embeddings=False), presets.qwen2_5_vl_7b()])
def test_a_rendered_config_parses_to_itself(config: VlmConfig) -> None:
    family = family_named(config.family)
    assert family.parse(json.loads(json.dumps(family.render(config)))) == config


def test_configs_as_transformers_5_saves_them() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen3Config

    config = presets.tiny(tie_embeddings=False)
    family = family_named(config.family)
    nested = json.loads(Qwen2_5_VLConfig(**family.render(config)).to_json_string())
    assert "text_config" in nested
    assert family_for(nested).parse(nested) == config

    saved = json.loads(
        Qwen3Config(hidden_size=64, num_hidden_layers=2, head_dim=32, eos_token_id=[3, 4]).to_json_string()
    )
    parsed = family_for(saved).parse(saved)
    assert (parsed.vision, parsed.text.head_dim, parsed.text.qk_norm, parsed.eos_token_ids) == (None, 32, True, (3, 4))
    assert family_for(saved).parse(FAMILIES["qwen3"].render(parsed)) == parsed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "'model_type' is 'bert', supported are qwen2_5_vl, [a-z0-9_, ]*$"),
        ({"model_type": "qwen2_6_vl"}, "'model_type' is 'qwen2_6_vl', supported are .*; qwen2_5_vl is another model"),
        ({"model_type": None}, "'model_type' is missing, supported are qwen2_5_vl, "),
        ({"model_type": ["qwen3"]}, r"'model_type' is \['qwen3'\], supported"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": 33}, "'hidden_size' is 33"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', expected 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_type' is 'yarn', expected 'default' or 'mrope'"),
        ({"vision_config": None}, "'vision_config' is missing"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types' says 'sliding_attention' of layer 1"),
        (
            {"use_sliding_window": True, "max_window_layers": 1, "layer_types": ["sliding_attention"]},
            "'layer_types' says 'sliding_attention' of layer 0, expected 'full_attention'",
        ),
        ({"vision_config": {"depth": 2}}, "vision_config: 'hidden_size' is missing"),
        ({"eos_token_id": "<|im_end|>"}, "'eos_token_id' is '<|im_end|>', expected a token id or a list of them"),
    ],
)
def test_what_we_do_not_compute_is_refused(change: dict, message: str) -> None:
    hf = family_named("qwen2_5_vl").render(presets.tiny()) | change
    with pytest.raises(ConfigError, match=message):
        family_for(hf).parse(hf)


# Numbers as large as one likes: no array has their size.
NO_SIZES = ("rope_theta", "max_position_embeddings", "max_window_layers")
NOT_SIZES = ("7", 2.0, True, [4], {}, -1, 10**9 + 1, 10**40, math.nan)


@pytest.mark.parametrize(
    ("name", "section"),
    [("qwen2_5_vl", None), ("qwen2_5_vl", "vision_config"), ("qwen2_5_vl", "text_config"), ("qwen3", None)],
)
def test_a_value_of_the_wrong_kind_is_one_line_that_names_its_key(name: str, section: str | None) -> None:
    family = family_named(name)
    config = presets.tiny()
    hf = family.render(config)
    if name == "qwen3":
        hf = FAMILIES["qwen3"].render(dataclasses.replace(config, vision=None))
    elif section == "text_config":
        hf = {"model_type": name, "vision_config": hf["vision_config"], "text_config": hf}
    inner = hf[section] if section else hf
    where = f"config.json: {section}" if section else "config.json"
    for key, value in inner.items():
        if not isinstance(value, (int, float)):
            continue
        for wrong in NOT_SIZES if not isinstance(value, bool) else ("yes", 1, [True]):
            broken = inner | {key: wrong}
            full = {**hf, section: broken} if section else broken
            try:
                family.parse(full)
            except ConfigError as error:
                assert str(error).startswith(where) and "\n" not in str(error)
                assert key in str(error) or "eos" in key
            else:
                assert isinstance(value, float) or "token" in key or key in NO_SIZES


@pytest.mark.parametrize("top", [None, False, True])
@pytest.mark.parametrize("nested", [None, False, True])
def test_the_head_is_tied_where_transformers_ties_it(top: bool | None, nested: bool | None) -> None:
    from transformers import Qwen2_5_VLConfig

    flat = family_named("qwen2_5_vl").render(presets.tiny())
    del flat["tie_word_embeddings"]
    hf = {"model_type": "qwen2_5_vl", "vision_config": flat.pop("vision_config"), "text_config": flat}
    hf |= {} if top is None else {"tie_word_embeddings": top}
    flat |= {} if nested is None else {"tie_word_embeddings": nested}
    assert family_for(hf).parse(hf).text.tie_embeddings == bool(top or nested)
    stated = {key: dict(v) if isinstance(v, dict) else v for key, v in hf.items()}  # it changes what it is given
    if not (top is None and nested):  # of this one the releases of transformers differ
        assert Qwen2_5_VLConfig(**stated).tie_word_embeddings == bool(top or nested)


@pytest.mark.parametrize(
    ("kind", "dtype", "mechanisms", "expected"),
    [
        ("compute", "float32", (), 114_688),
        ("compute", "bfloat16", (), 57_344),
        ("int8", "bfloat16", (), 29_568),
        ("int8", "bfloat16", (Rave(rank=16),), 29_568 + 8_064),
    ],
)
def test_a_token_of_the_7b_takes_the_cache_that_the_page_says(
    repo: Path, kind: CacheType, dtype: FloatName, mechanisms: tuple[Rave, ...], expected: int
) -> None:
    options = ModelOptions(mechanisms=mechanisms, param_dtype=dtype, compute_dtype=dtype)
    made = jax.eval_shape(lambda: Vlm(presets.qwen2_5_vl_7b(), options, key=jax.random.key(0)).empty_cache(1, 1, kind))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.layer_runs)) == expected
    page = (repo / "docs" / "generation.md").read_text()
    assert all(f"{number:,}" in page for number in ({expected} if not mechanisms else {8_064}))


@pytest.mark.parametrize(
    ("config", "absent"), [(presets.qwen2_5_vl_3b(), 8), (qwen3_vl_8b(), 32), (qwen3_vl_30b_a3b(), 16)]
)
def test_kv_heads_that_a_config_leaves_out_are_those_of_the_class_in_transformers(
    config: VlmConfig, absent: int
) -> None:
    """And null means as many as query heads."""
    record = family_named(config.family)
    rendered = json.loads(json.dumps(record.render(config)))
    text = rendered.get("text_config", rendered)
    text["num_key_value_heads"] = None
    assert record.parse(rendered).text.num_kv_heads == config.text.num_heads
    del text["num_key_value_heads"]
    assert record.parse(rendered).text.num_kv_heads == absent
