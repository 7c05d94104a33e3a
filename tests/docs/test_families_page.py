"""The toy family of docs/families.md, as it stands there, is a family."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from rave_jax import families
from rave_jax.config import ConfigError
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import locate, named_parameters
from rave_jax.models.vlm import Vlm

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text()


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> families.Family:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code) == 1
    module: dict[str, Any] = {}
    exec(code[0], module)
    toy = module["FAMILY"]
    monkeypatch.setitem(families.FAMILIES, toy.model_type, toy)
    return toy


def test_its_config_is_found_and_parses_to_itself(family: families.Family) -> None:
    config = VlmConfig(text=TextConfig(qkv_bias=False, tie_embeddings=False), eos_token_ids=(3, 4), family="toy")
    hf = json.loads(json.dumps(family.render(config)))
    assert families.family_for(hf) is family and family.parse(hf) == config
    with pytest.raises(ConfigError, match="'hidden_act' is 'gelu', expected 'silu'"):
        family.parse({**hf, "hidden_act": "gelu"})


def test_its_tensors_are_the_parameters_of_its_model(family: families.Family) -> None:
    config = VlmConfig(text=TextConfig(qkv_bias=False, num_layers=2), family="toy")
    model = jax.eval_shape(lambda: Vlm(config, ModelOptions(), key=jax.random.key(0)))
    rules = family.tensors(config)
    assert {locate(model, rule)[0] for rule in rules} == set(named_parameters(model))


def test_its_table_has_every_family_and_the_parameters_of_every_preset() -> None:
    lines = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    rows = {row[1].strip("` "): row for row in lines}
    assert [name for name in families.FAMILIES if name not in rows] == []
    for name, family in families.FAMILIES.items():
        stated = re.findall(r"\d+(?:,\d{3})+", rows[name][3])
        counts = [f"{parameters(family, make()):,}" for make in presets(name)]
        assert sorted(counts) == sorted(stated), name


def presets(name: str) -> list[Callable[[], VlmConfig]]:
    """The released sizes of a family: functions of its presets that ask for nothing."""
    spec = importlib.util.find_spec(f"rave_jax.families.{name}.presets")
    if spec is None:
        return []
    made = [f for f in vars(importlib.import_module(spec.name)).values() if inspect.isfunction(f)]
    made = [f for f in made if f.__module__ == spec.name and not inspect.signature(f).parameters]
    return [f for f in made if not f.__name__.startswith("_")]


def parameters(family: families.Family, config: VlmConfig) -> int:
    """Numbers in all tensors of a checkpoint, some of which hold two parameters."""
    return sum({rule.hf_key: math.prod(rule.shape) for rule in family.tensors(config)}.values())
