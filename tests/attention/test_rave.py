"""RAVE: where the bias acts, what it reads, how it starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention.functions import spread
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.attention.base import tile_bias, ungroup_heads

DIMS = at.AttentionDims(4, 2, 8)
KEY = jax.random.key(0)
B, T = 2, 12
KINDS = np.array([[1, 2, 2, 2, 1, 1, 2, 2, 1, 1, 0, 0], [1] * 12])
FORMS = ("log_gate", "tanh", "linear", "centered_sigmoid")
TERMS = ("pair", "pair+q", "pair+k", "all")


def info() -> TokenInfo:
    kind = jnp.asarray(KINDS, jnp.int32)
    zeros = jnp.zeros_like(kind)
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), kind.shape)
    return TokenInfo(*[zeros] * len(TokenInfo._fields))._replace(
        kind=kind, document=(kind > 0).astype(jnp.int32), offset=place
    )


def features(seed: int = 0) -> at.Features:
    rng = np.random.default_rng(seed)
    q, q0, k, v, k0 = (jnp.asarray(rng.normal(size=(B, T, n, 8)), jnp.float32) for n in (4, 4, 2, 2, 2))
    return at.Features(q, k, v, q0, k0, jnp.zeros((B, T, 1)))


def bias_map(config: at.Rave, x: at.Features) -> np.ndarray:
    """The bias as [B,T,H,S]."""
    gate = config.build(DIMS, KEY)
    score = gate.score(x, gate.remember(x), info(), info())
    assert score is not None
    H, K, _, _ = DIMS
    (term,) = (spread(term, H, K) for term in score.terms)
    return np.asarray(ungroup_heads(tile_bias(term, jnp.zeros((B, K, H // K, T, T)), K)))


def by_hand(gate, x: at.Features, config: at.Rave, b: int, i: int, head: int, j: int) -> float:
    """The stated formula for one (query, key) pair in float64."""
    q0, k0 = np.float64(x.q0[b, i, head]), np.float64(x.k0[b, j, head // 2])
    z = (
        (q0 @ np.float64(gate.query_proj[...][head]))
        @ (k0 @ np.float64(gate.key_proj[...][head // 2]))
        / config.rank**0.5
    )
    if config.terms in ("pair+q", "all"):
        z += q0 @ np.float64(gate.query_term[...][head]) + float(gate.constant[...][head])
    if config.terms in ("pair+k", "all"):
        z += k0 @ np.float64(gate.key_term[...][head // 2])
    sigmoid = 1 / (1 + np.exp(-z))
    return {
        "log_gate": np.log(2 * sigmoid),
        "tanh": config.limit * np.tanh(z / config.limit),
        "linear": z,
        "centered_sigmoid": 2 * sigmoid - 1,
    }[config.form]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("form", FORMS)
def test_bias_is_the_stated_formula_on_visual_keys_and_zero_elsewhere(form, terms):
    config = at.Rave(form=form, terms=terms, rank=4, start="random")
    x, gate = features(), config.build(DIMS, KEY)
    given = bias_map(config, x)
    for b, i, head, j in ((0, 4, 0, 1), (0, 5, 3, 7), (0, 2, 2, 1)):
        np.testing.assert_allclose(given[b, i, head, j], by_hand(gate, x, config, b, i, head, j), rtol=1e-4, atol=1e-6)
    assert np.all(given[0][..., KINDS[0] != Kind.VISUAL] == 0) and np.all(given[1] == 0)
    assert np.all(given[0, KINDS[0] > 0][..., KINDS[0] == Kind.VISUAL] != 0)


def test_selected_heads_and_text_queries_only():
    x = features()
    some = bias_map(at.Rave(heads=(1, 3), start="random"), x)
    assert np.all(some[:, :, (0, 2)] == 0) and np.any(some[:, :, (1, 3)] != 0)
    text = bias_map(at.Rave(queries="text", start="random"), x)
    assert np.all(text[0, KINDS[0] != Kind.TEXT] == 0)
    assert np.all(text[0, KINDS[0] == Kind.TEXT][..., KINDS[0] == Kind.VISUAL] != 0)
    with pytest.raises(ConfigError, match="heads"):
        at.Rave(heads=(4,)).build(DIMS, KEY)


def test_the_bias_reads_features_before_rope_only():
    x, moved = features(), features(seed=1)
    config = at.Rave(start="random")
    assert np.array_equal(bias_map(config, x), bias_map(config, x._replace(q=moved.q, k=moved.k)))
    assert not np.array_equal(bias_map(config, x), bias_map(config, x._replace(q0=moved.q0)))


def test_the_bias_after_rope_is_the_same_function_of_rotated_features():
    x, moved = features(), features(seed=1)
    before, after = at.Rave(start="random"), at.Rave(start="random", features="post_rope")
    assert np.array_equal(bias_map(after, x), bias_map(before, x._replace(q0=x.q, k0=x.k)))
    assert np.array_equal(bias_map(after, x), bias_map(after, x._replace(q0=moved.q0, k0=moved.k0)))


def gate_gradient(gate, x, token_info):
    codes = at.causal_codes(token_info)

    def loss(gate):
        return (at.attend(x, at.remember([gate], x), codes, token_info, token_info, [gate]).out ** 2).sum()

    return jax.grad(loss)(gate)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("form", FORMS)
def test_the_gate_learns_from_zero_and_only_from_images(form, terms):
    gate = at.Rave(form=form, terms=terms).build(DIMS, KEY)
    first = gate_gradient(gate, features(), info())
    updated = jax.tree.map(lambda p, g: p - 0.1 * g, gate, first)
    second = gate_gradient(updated, features(1), info())
    for gradient in jax.tree.leaves(second):
        assert np.any(np.asarray(gradient) != 0)
    text = info()._replace(kind=jnp.where(info().kind == Kind.VISUAL, Kind.TEXT, info().kind))
    for gradient in jax.tree.leaves(gate_gradient(updated, features(), text)):
        assert np.all(np.asarray(gradient) == 0)


def test_grouped_heads_equal_expanded_heads():
    x = features()
    config = at.Rave(start="random", rank=4)
    gate = config.build(DIMS, KEY)
    wide = config.build(at.AttentionDims(4, 4, 8), KEY)
    wide.query_proj[...], wide.query_term[...], wide.constant[...] = (
        gate.query_proj[...],
        gate.query_term[...],
        gate.constant[...],
    )
    wide.key_proj[...], wide.key_term[...] = (jnp.repeat(p[...], 2, 0) for p in (gate.key_proj, gate.key_term))
    every = x._replace(**{n: jnp.repeat(getattr(x, n), 2, 2) for n in ("k", "v", "k0")})
    codes = at.causal_codes(info())
    grouped = at.attend(x, at.remember([gate], x), codes, info(), info(), [gate]).out
    expanded = at.attend(every, at.remember([wide], every), codes, info(), info(), [wide]).out
    np.testing.assert_allclose(grouped, expanded, atol=1e-6)


def test_bad_configs_name_the_field():
    for bad in ({"rank": 0}, {"limit": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            at.Rave(**bad)
