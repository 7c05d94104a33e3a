from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=2, vision_depth=1, full_attention_blocks=(0,))
TARGETS = (r"decoder\.attention\.(query|key)", "decoder.attention.output", ".*qkv", "vision.merger.first")
BATCH = batch([[document([3, Visual(1, 4, 6), 5], CONFIG, np.random.default_rng(0))]], CONFIG, tokens=16, patches=24)


def build(options: ModelOptions) -> Vlm:
    return jax.jit(lambda: Vlm(CONFIG, options, key=jax.random.key(0)))()


@jax.jit
def hidden(model: Vlm) -> jax.Array:
    return model.forward(BATCH).hidden


def test_adapters_start_as_nothing_and_learn() -> None:
    adapted = build(ModelOptions(lora=Lora(rank=2, targets=TARGETS)))
    values = named_parameters(adapted)
    bare = jax.eval_shape(lambda: Vlm(CONFIG, ModelOptions(), key=jax.random.key(0)))
    plain = with_values(bare, {path: values[path][...] for path in named_parameters(bare)})
    names = set(values) - set(named_parameters(plain))
    paths = (*(f"attention.{linear}" for linear in ("query", "key", "output", "qkv")), "vision.merger.first")
    assert {name.split(".layers.")[-1] for name in names} == {
        f"{path}.adapter.{part}" for path in paths for part in ("down", "up")
    }
    np.testing.assert_array_equal(hidden(plain), hidden(adapted))

    grads = named_parameters(jax.jit(jax.grad(lambda m: jnp.sum(m.forward(BATCH).hidden[0, 4] ** 3)))(adapted))
    for name in names:
        moved = np.abs(grads[name][...]).max(axis=tuple(range(1, grads[name].ndim)))
        assert (moved > 0).all() if name.endswith("up") else (moved == 0).all(), name


@pytest.mark.slow
def test_an_adapted_model_starts_with_the_weights_it_has_without() -> None:
    plain, adapted = build(ModelOptions()), named_parameters(build(ModelOptions(lora=Lora(rank=2, targets=TARGETS))))
    for path, param in named_parameters(plain).items():
        np.testing.assert_array_equal(param[...], adapted[path][...])


def test_an_adapter_equals_the_merged_weight() -> None:
    model = made(CONFIG, ModelOptions(lora=Lora(rank=2, alpha=3.0, targets=("decoder.attention.query",))))
    path = "decoder.layer_runs.0.layers.attention.query."
    model = with_values(model, {path + "adapter.up": 0 * named_parameters(model)[path + "adapter.up"][...]})
    params = named_parameters(model)
    up = jax.random.normal(jax.random.key(1), params[path + "adapter.up"].shape)
    adapted = with_values(model, {path + "adapter.up": up})
    update = 1.5 * jnp.einsum("LHhr,LrD->LHhD", up, params[path + "adapter.down"][...])
    merged = with_values(model, {path + "weight": params[path + "weight"][...] + update})
    np.testing.assert_allclose(hidden(adapted), hidden(merged), atol=1e-5)
    assert np.abs(hidden(adapted) - hidden(model)).max() > 1e-3


def test_a_target_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.targets.1 is '\(', expected a path or a regular expression"):
        Lora(targets=("decoder.attention.query", "("))


def test_an_unknown_target_is_refused() -> None:
    options = ModelOptions(lora=Lora(targets=("decoder.attention.query", "decoder.attention.quarry")))
    with pytest.raises(ConfigError, match=r"names decoder.attention.quarry, expected some of decoder.attention.key,"):
        jax.eval_shape(lambda: Vlm(CONFIG, options, key=jax.random.key(0)))
