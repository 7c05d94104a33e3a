"""MoH: both routers are the released code's formulas, and all heads active is the plain layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rave_jax import attention as at
from rave_jax.attention.moh import HeadRouter
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from tests.attention.packed import DIMS, KEY, ROWS, attend, everything, features, info_of

D = 5
WIDE = DIMS._replace(hidden_size=D)
LEARNED = at.Moh("learned", shared=0.5, active=0.25)


def moh(config: at.Moh, dims: at.AttentionDims = WIDE, seed: int = 3) -> at.Mechanism:
    """The mechanism with random numbers in its parameters."""
    mechanism = at.build_mechanisms((config,), dims, KEY)[0]
    rng = np.random.default_rng(seed)
    for param in jax.tree.leaves(mechanism, is_leaf=lambda x: isinstance(x, nnx.Param)):
        if isinstance(param, nnx.Param):
            param[...] = jnp.asarray(rng.normal(size=param.shape), jnp.float32)
    return mechanism


def test_by_queries_the_largest_routed_heads_are_used_and_the_first_always() -> None:
    """As MoH-LLaMA3: norms over their standard deviation, softmax, the K largest, gates of 1."""
    x = features()
    gate = np.asarray(moh(at.Moh(shared=0.25, active=0.5), DIMS).head_gate(x, x.q, info_of(*ROWS)))
    norms = np.linalg.norm(np.float64(x.q0), axis=-1)[:, :, 1:]
    scores = np.exp(norms / norms.std(-1, ddof=1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    wanted = np.ones(gate.shape)
    for place in np.ndindex(gate.shape[:2]):
        wanted[place][1 + np.argsort(-scores[place])[2:]] = 0
    np.testing.assert_array_equal(gate, wanted)
    assert len(np.unique(gate.reshape(-1, 4), axis=0)) > 2, "tokens choose different heads"


def learned(weights: dict[str, Any], hidden: Any, shared: int, active: int) -> Any:
    """As MoH-ViT, densely: softmax, the K largest, over their sum, times K; and the balance of both kinds."""
    x = hidden / jnp.sqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + 1e-6)
    share = jax.nn.softmax(x @ weights["of_routed"].T)
    least = jnp.sort(share, axis=-1)[..., -active, None]
    chosen = jnp.where(share >= least, share, 0.0)
    rest = chosen / chosen.sum(-1, keepdims=True) * active
    if not shared:
        return rest
    first = jax.nn.softmax(x @ weights["of_shared"].T) * shared if shared > 1 else jnp.ones((*x.shape[:2], 1))
    both = jax.nn.softmax(x @ weights["of_both"].T) * 2
    return jnp.concatenate([first * both[..., :1], rest * both[..., 1:]], axis=-1)


COUNTS = [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow), pytest.param((0, 3), marks=pytest.mark.slow)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_learned_router_is_the_stated_formula_with_its_gradients(counts: tuple[int, int]) -> None:
    x, info, (shared, active) = features(), info_of(*ROWS), counts
    ct = np.random.default_rng(1).normal(size=(*x.q.shape[:2], 4))

    @jax.jit
    def ours(mechanism: Any, hidden: Any) -> Any:
        def total(mechanism: Any, hidden: Any) -> Any:
            gate = mechanism.head_gate(x._replace(hidden=hidden), x.q, info)
            return jnp.sum(gate * ct), gate

        return jax.grad(total, argnums=(0, 1), has_aux=True)(mechanism, hidden)

    @jax.jit
    def theirs(weights: Any, hidden: Any) -> Any:
        def total(weights: Any, hidden: Any) -> Any:
            gate = learned(weights, hidden, shared, active)
            return jnp.sum(gate * ct), gate

        return jax.grad(total, argnums=(0, 1), has_aux=True)(weights, hidden)

    mechanism = moh(at.Moh("learned", shared=shared / 4, active=active / 4))
    sizes = {"of_routed": 4 - shared, "of_shared": shared * (shared > 1), "of_both": 2 * (shared > 0)}
    weights = of_names(mechanism)
    assert {name: len(value) for name, value in weights.items()} == {name: n for name, n in sizes.items() if n}
    (gradient, hidden), gate = ours(mechanism, x.hidden)
    expected = theirs(weights, x.hidden)
    found = ((of_names(gradient), hidden), gate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def of_names(mechanism: Any) -> dict[str, Any]:
    """The parameters, or their gradients."""
    names = ("of_routed", "of_shared", "of_both")
    return {name: getattr(mechanism, name)[...] for name in names if hasattr(mechanism, name)}


ALL = (at.Moh(active=0.5), at.Moh("learned", active=0.5), at.Moh("learned", shared=1.0, active=0.0))


@pytest.mark.parametrize("config", ALL, ids=str)
def test_all_heads_active_change_no_bit(config: at.Moh) -> None:
    x, info = features(), info_of(*ROWS)
    mechanisms = at.build_mechanisms((config,), WIDE, KEY)
    assert (type(mechanisms[0]) is at.Mechanism) == (config.router == "query_norm")
    found, plain = (jax.jit(lambda x, m=m: attend(x, info, m).out)(x) for m in (mechanisms, []))
    np.testing.assert_array_equal(found, plain)


def test_outputs_are_gated_with_a_gradient_through_the_choice() -> None:
    """A gate of 0 or 1 has the gradient of its share: the queries learn how large to be."""
    x, info = features(), info_of(*ROWS)
    config = at.Moh(shared=0.25, active=0.5)
    out, _, gradients = everything((config,), x, info, x.q)
    plain, _, others = everything((), x, info, x.q)
    gate = np.asarray(moh(config, DIMS).head_gate(x, x.q, info))
    np.testing.assert_allclose(out, plain * gate[..., None], atol=1e-6)
    assert np.abs(gradients.q0).max() > 1e-3 and np.all(np.asarray(others.q0) == 0)


@jax.jit
def losses(x: at.Features, info: TokenInfo, mechanism: Any) -> Any:
    return attend(x, info, [mechanism], losses=True).losses


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_the_loss_balances_the_heads_of_each_document(router: Any) -> None:
    """E^2 mean_h(mean_i p_ih mean_i chosen_ih), by documents: so a packed row has the loss of its documents."""
    x, info, config = features(), info_of(*ROWS), at.Moh(router, balance=0.5)
    mechanism: Any = moh(config)
    routed = mechanism.routed(x)
    share, chosen = np.asarray(routed.share), np.asarray(routed.chosen)
    np.testing.assert_allclose(share.sum(-1), 1, rtol=1e-6)
    assert np.all(chosen.sum(-1) == 1)
    wanted = 0.0
    for b, documents in enumerate(ROWS):
        starts = np.cumsum([0, *map(len, documents)])
        for span in map(slice, starts[:-1], starts[1:]):
            wanted += 0.5 * 2**2 * np.mean(share[b, span].mean(0) * chosen[b, span].mean(0))
    said = losses(x, info, mechanism)
    np.testing.assert_allclose(said["moh_balance"], wanted, rtol=1e-5)
    assert mechanism.loss_weights(info) == {"moh_balance": sum(map(len, ROWS))}
    empty: TokenInfo = jax.tree.map(jnp.zeros_like, info)
    assert mechanism.loss_weights(empty) == {"moh_balance": 0}
    assert losses(x, empty, mechanism) == {"moh_balance": 0}
    silent = moh(dataclasses.replace(config, balance=0.0))
    assert silent.loss_weights(info) == {} == losses(x, info, silent)


@pytest.mark.parametrize(
    ("heads", "shared", "active", "counts"),
    [(15, 0.5, 0.25, (7, 3)), (100, 0.29, 0.57, (29, 57)), (15, 0.5, 0.5, (7, 8)), (3, 0.5, 0.25, (1, 1))],
)
def test_shares_of_heads_are_rounded_down(heads: int, shared: float, active: float, counts: tuple[int, int]) -> None:
    """As the released code rounds; but shares of 1 in all drop no head, and heads to choose are one at least."""
    built = at.Moh(shared=shared, active=active, balance=1.0).build(DIMS._replace(num_heads=heads, num_kv_heads=1), KEY)
    assert isinstance(built, HeadRouter) and built.counts == (heads, *counts)


def test_bad_shares_name_the_field() -> None:
    for bad in ({"shared": 1.5}, {"active": -0.1}, {"shared": 0.8, "active": 0.5}, {"balance": -1.0}):
        with pytest.raises(ConfigError, match=[*bad][-1]):
            at.Moh(**bad)
    with pytest.raises(ConfigError, match=r"active is 0.0, expected with shared at least one of 4 heads"):
        at.Moh(shared=0.1, active=0.0).build(DIMS, KEY)
    with pytest.raises(ConfigError, match="router is 'learned', expected 'query_norm': the hidden size"):
        LEARNED.build(DIMS, KEY)
