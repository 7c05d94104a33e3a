from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.families.config import ExpertsConfig, TextConfig, VlmConfig
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.parameters import named_parameters, shardings, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
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


EXPERTS = VlmConfig(
    text=TextConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=24,
        qkv_bias=False,
        tie_embeddings=False,
        experts=ExpertsConfig(count=4, chosen=2, mlp_size=8, dense_layers=(0,)),
    ),
    family="qwen3_moe",
)
TIED = dataclasses.replace(EXPERTS, text=dataclasses.replace(EXPERTS.text, tie_embeddings=True))
AROUND = Lora(rank=3, alpha=4.5, targets=(r"decoder\.mlp\..*", "lm_head", "embed"))
ROWS = batch(
    [
        [document([3 + n], EXPERTS, np.random.default_rng(n)), document([9 - n], EXPERTS, np.random.default_rng(9))]
        for n in range(4)
    ],
    EXPERTS,
    tokens=12,
    patches=0,
)


@jax.jit
def learned(model: Vlm) -> tuple[jax.Array, jax.Array, Vlm]:
    """Logits, the loss by them, and its gradients."""

    def loss(model: Vlm) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(model.forward(ROWS).hidden)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ROWS.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * ROWS.loss_weights), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(model)
    return logits, value, gradients


def updated(model: Vlm) -> tuple[Vlm, dict[str, tuple[str, str, str]]]:
    """The model without adapters whose weights they are in, by einsum, and which (weight, down, up) belong together."""
    params = {path: np.float64(x[...]) for path, x in named_parameters(model).items()}
    plain = made(EXPERTS)  # with a head of its own, as a tied model has it once an adapter is in it
    values = {path: params.get(path, params["embed.weight"]) for path in named_parameters(plain)}
    pairs = {}
    for down in [path for path in params if path.endswith("adapter.down")]:
        up, weight = f"{down.removesuffix('down')}up", down.replace("adapter.down", "weight").replace("tied", "lm")
        factors = params[up], params[down]
        pairs[down.removesuffix(".adapter.down")] = weight, down, up
        values[weight] = values[weight] + 1.5 * np.einsum("...or,...ri->...oi", *factors)
    return with_values(plain, {path: jnp.float32(x) for path, x in values.items()}), pairs


@pytest.mark.parametrize("config", [EXPERTS, pytest.param(TIED, marks=pytest.mark.slow)], ids=["untied", "tied"])
def test_adapters_of_experts_router_head_and_embedding_equal_merged_weights(config: VlmConfig) -> None:
    """With gradients by the chain rule: of up, scale * dW down^T, and of down, scale * up^T dW."""
    model = made(config, ModelOptions(lora=AROUND))
    merged, pairs = updated(model)
    head = "lm_head" if config is EXPERTS else "tied_head"
    of_layers = {f"decoder.layer_runs.{n}.layers.mlp.{name}" for n in (0, 1) for name in ("gate", "up", "down")}
    assert set(pairs) == {*of_layers, "decoder.layer_runs.1.layers.mlp.router", "embed", head}
    (logits, value, ours), (wanted, expected, theirs) = learned(model), learned(merged)
    np.testing.assert_allclose(logits, wanted, atol=2e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    params, ours, theirs = named_parameters(model), named_parameters(ours), named_parameters(theirs)
    for name, (weight, down, up) in pairs.items():
        of = np.float64(theirs[weight][...])
        chained = {
            up: np.einsum("...oi,...ri->...or", of, params[down][...]),
            down: np.einsum("...oi,...or->...ri", of, params[up][...]),
        }
        for path, gradient in chained.items():
            near = 1e-4 * np.abs(gradient).max()
            np.testing.assert_allclose(ours[path][...], 1.5 * gradient, atol=near, err_msg=name)


def test_adapters_of_experts_and_of_the_head_on_a_mesh_of_eight() -> None:
    model = made(EXPERTS, ModelOptions(lora=AROUND))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    with use_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        found = jax.jit(lambda model: learned.__wrapped__(model))(placed)
    up = named_parameters(placed)["decoder.layer_runs.1.layers.mlp.gate.adapter.up"][...]
    assert up.addressable_shards[0].data.shape == (1, 1, 8, 3)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(learned(model)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_an_adapter_of_a_tied_head_leaves_the_embedding_as_it_is() -> None:
    model, plain = (made(TIED, ModelOptions(lora=lora)) for lora in (Lora(targets=("lm_head",)), None))
    x = jnp.ones((1, 2, 16))
    np.testing.assert_array_equal(model.embed(ROWS.tokens, x.dtype), plain.embed(ROWS.tokens, x.dtype))
    assert np.abs(model.logits(x) - plain.logits(x)).max() > 0.1


def test_a_target_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.targets.1 is '\(', expected a path or a regular expression"):
        Lora(targets=("decoder.attention.query", "("))


def test_an_unknown_target_is_refused() -> None:
    options = ModelOptions(lora=Lora(targets=("decoder.attention.query", "decoder.attention.quarry")))
    with pytest.raises(ConfigError, match=r"names decoder.attention.quarry, expected some of decoder.attention.key,"):
        jax.eval_shape(lambda: Vlm(CONFIG, options, key=jax.random.key(0)))
