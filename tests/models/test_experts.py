"""Layers of experts against plain formulas, alone and on a mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.families.config import ExpertsConfig, LayerKind, TextConfig, VlmConfig
from rave_jax.models.config import ModelOptions, Remat
from rave_jax.models.experts import Choice, Experts, balance_loss, router_sums
from rave_jax.models.forward import Want
from rave_jax.models.parameters import named_parameters, param_axes, shardings
from rave_jax.models.stack import rematerialised
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.models.layout import batch, document
from tests.models.made import model as made

D = 16
CONFIG = ExpertsConfig(count=8, chosen=3, mlp_size=12)
TEXT = TextConfig(
    vocab_size=64,
    hidden_size=D,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=24,
    qkv_bias=False,
    experts=ExpertsConfig(count=8, chosen=2, mlp_size=12, balance=0.5, dense_layers=(1,)),
)
MODEL = VlmConfig(text=TEXT, family="qwen3_moe")


@functools.cache
def a_model(options: ModelOptions | None = None) -> Vlm:
    return made(MODEL, options or ModelOptions())


def plain(layer: Experts, x: jax.Array, choice: Choice) -> jax.Array:
    """Every expert of every token, then those that were chosen."""
    gate, up, down = (part.weight[...] for part in (layer.gate, layer.up, layer.down))
    hidden = jax.nn.silu(jnp.einsum("BTD,EFD->BTEF", x, gate)) * jnp.einsum("BTD,EFD->BTEF", x, up)
    each = jnp.einsum("BTEF,EDF->BTED", hidden, down)
    counts = jnp.sum(jax.nn.one_hot(choice.expert, len(gate)) * choice.weight[..., None], axis=2)
    return jnp.einsum("BTED,BTE->BTD", each, counts)


def a_layer(config: ExpertsConfig = CONFIG) -> Experts:
    return Experts(config, D, dtype=jnp.dtype(jnp.float32), key=jax.random.key(3))


@functools.partial(jax.jit, static_argnums=0)
def outputs(name: str, layer: Experts, x: jax.Array, ct: jax.Array) -> tuple[jax.Array, ...]:
    def run(layer: Experts, x: jax.Array) -> jax.Array:
        choice = layer.choose(x)
        return layer(x, choice) if name == "ours" else plain(layer, x, choice)

    made, pull = jax.vjp(jax.checkpoint(run), layer, x)
    return made, *jax.tree.leaves(pull(ct))


def arrays(seed: int, rows: int = 4, length: int = 9) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x, ct = (jnp.asarray(rng.standard_normal((rows, length, D)), jnp.float32) for _ in range(2))
    return x, ct


def test_output_and_gradients_equal_all_experts_for_all_tokens() -> None:
    layer, (x, ct) = a_layer(), arrays(0)
    for ours, theirs in zip(outputs("ours", layer, x, ct), outputs("plain", layer, x, ct), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_no_token_is_dropped_when_all_choose_the_same_experts() -> None:
    layer, (x, ct) = a_layer(), arrays(1)
    x = jnp.broadcast_to(x[:1, :1], x.shape)
    for ours, theirs in zip(outputs("ours", layer, x, ct), outputs("plain", layer, x, ct), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_probabilities_are_of_all_experts_and_normalised_where_the_config_says_so() -> None:
    x = arrays(2)[0]
    for normalise in (True, False):
        layer = a_layer(ExpertsConfig(count=8, chosen=3, mlp_size=12, normalise=normalise))
        choice = layer.choose(x)
        wanted = jax.nn.softmax(jnp.einsum("BTD,ED->BTE", x, layer.router.weight[...]), axis=-1)
        np.testing.assert_allclose(choice.probability, wanted, atol=1e-6)
        best = np.sort(wanted, axis=-1)[..., :-4:-1]
        np.testing.assert_allclose(choice.weight, best / best.sum(-1, keepdims=True) if normalise else best, atol=1e-6)


def test_half_precision_is_near_float32() -> None:
    layer, (x, ct) = a_layer(), arrays(3)
    exact = outputs("plain", layer, x, ct)[0]
    half = jax.jit(lambda layer, x: layer(x, layer.choose(x)))(layer, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # A token whose choice is nearly a tie may go elsewhere; the others are as near as the number type allows.
    close = np.abs(np.asarray(half, np.float32) - exact).max(-1) < 0.05 * np.abs(exact).max()
    assert close.mean() > 0.9


@pytest.mark.parametrize(("remat", "products"), [("none", 9), ("full", 11), ("dots", 9)])
def test_rematerialisation_multiplies_again_only_where_it_should(remat: Remat, products: int) -> None:
    """Three products forward and six backward; with "full" those of gate and up once more. As a TPU gets them."""
    layer = a_layer()

    def run(layer: Experts, x: jax.Array) -> jax.Array:
        step = rematerialised(lambda layer, x: layer(x, layer.choose(x)), remat)
        return jnp.sum(jnp.sin(step(layer, x)))

    lowered = jax.jit(jax.grad(run, argnums=(0, 1))).trace(layer, arrays(0)[0]).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count('"chlo.ragged_dot"(') == products


def test_the_loss_of_routers_counts_tokens_that_are_no_padding() -> None:
    layer, x = a_layer(), arrays(4)[0]
    choice = layer.choose(x)
    real = jnp.arange(9)[None] < jnp.array([9, 4, 0, 7])[:, None]
    sums = router_sums(choice, real)
    chosen, p = np.zeros(8), np.asarray(choice.probability)[np.asarray(real)]
    for e in np.asarray(choice.expert)[np.asarray(real)].ravel():
        chosen[e] += 1
    np.testing.assert_array_equal(sums.chosen, chosen)
    tokens = 20
    value = CONFIG.balance * 8 * np.sum(chosen / tokens * p.mean(0))
    np.testing.assert_allclose(balance_loss(sums, CONFIG) / tokens, value, rtol=1e-5)


def test_layers_have_experts_where_the_config_says_so() -> None:
    kinds = TEXT.layer_kinds
    assert kinds == (
        LayerKind(mlp="experts"),
        LayerKind(mlp="dense"),
        LayerKind(mlp="experts"),
        LayerKind(mlp="experts"),
    )
    every = ExpertsConfig(count=2, chosen=1, mlp_size=4, every=2)
    assert [every.in_layer(n) for n in range(4)] == [False, True, False, True]
    model = a_model()
    assert [(run.start, run.stop) for run in model.decoder.layer_runs] == [(0, 1), (1, 2), (2, 4)]
    params = named_parameters(model)
    assert params["decoder.layer_runs.2.layers.mlp.gate.weight"].shape == (2, 8, 12, D)
    assert params["decoder.layer_runs.1.layers.mlp.gate.weight"].shape == (1, 24, D)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"count": 0}, "count"),
        ({"chosen": 9}, "chosen"),
        ({"mlp_size": 0}, "mlp_size"),
        ({"balance": -1.0}, "balance"),
        ({"every": 0}, "every"),
    ],
)
def test_numbers_that_make_no_layer_are_refused_by_name(fields: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is "):
        ExpertsConfig(**{"count": 8, "chosen": 2, "mlp_size": 12, **fields})


def rows(count: int):
    rng = np.random.default_rng(5)
    docs = [[document([n], MODEL, rng), document([9 - n], MODEL, rng)] for n in range(1, count + 1)]
    return batch(docs, MODEL, tokens=12, patches=0)


@jax.jit
def loss_and_gradients(model: Vlm, rows) -> tuple[jax.Array, ...]:
    def loss(model: Vlm) -> tuple[jax.Array, jax.Array]:
        out = model.forward(rows, Want(losses=True))
        balance = out.losses["router"] / model.loss_weights(rows.info)["router"]
        return jnp.sum(jnp.sin(model.logits(out.hidden))) + balance, balance

    (value, balance), gradients = jax.value_and_grad(loss, has_aux=True)(model)
    return value, balance, *jax.tree.leaves(gradients)


LAYOUTS = pytest.mark.parametrize(
    "layout",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 1, "fsdp": 1, "tensor": 8},
        {"fsdp": 1, "expert": 2, "context": 2, "tensor": 2},
    ],
    ids=str,
)


@LAYOUTS
def test_experts_on_a_mesh_give_the_same_numbers(layout: dict[str, int]) -> None:
    layer, (x, ct) = a_layer(), arrays(6, length=8)
    mesh = make_mesh(MeshConfig(**layout), jax.devices()[:8])
    with use_mesh(mesh):
        placed = jax.device_put(layer, shardings(layer, mesh))
        ours = jax.jit(outputs.__wrapped__, static_argnums=0)("ours", placed, x, ct)
    for one, other in zip(ours, outputs("plain", layer, x, ct), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.slow
@LAYOUTS
def test_a_model_on_a_mesh_gives_the_same_numbers(layout: dict[str, int]) -> None:
    model, packed = a_model(ModelOptions(sequence_parallel=True)), rows(4)
    mesh = make_mesh(MeshConfig(**layout), jax.devices()[:8])
    with use_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        ours = jax.jit(loss_and_gradients.__wrapped__)(placed, packed)
    gate = named_parameters(placed)["decoder.layer_runs.2.layers.mlp.gate.weight"]
    assert param_axes(gate) == ("layers", "experts", None, "expert_embed")
    assert gate[...].addressable_shards[0].data.shape == (
        2,
        8 // (layout["tensor"] * layout.get("expert", 1)),
        12,
        D // (layout["fsdp"] * layout.get("context", 1)),
    )
    for one, other in zip(ours, loss_and_gradients(model, packed), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1, float(jnp.abs(other).max())))
