"""Routed attention against its stated rule, written out query by query in numpy."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax.kernels import routed
from rave_jax.kernels.attention import MaskCodes, PairBias, PairForm
from rave_jax.kernels.attention import attention as plain
from rave_jax.kernels.routed import RankBias, RouteRule, Routes, Routing
from rave_jax.kernels.routed import xla as blocks
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh

B, T, S, K, G, h, R = 2, 24, 40, 2, 2, 8, 6
FORM = PairForm("log_gate")


def operands(seed: int, dense: float = 0.0):
    """q, k, v, codes, routes and a pair bias: the queries stand behind the keys' first 16; regions are drawn, some of
    them empty, some keys of none."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = normal(B, T, K * G, h), normal(B, S, K, h), normal(B, S, K, h)
    keys = np.sort(rng.integers(0, R + 1, (B, S)), axis=1) * (rng.random((B, S)) < 0.8)
    order = np.broadcast_to(np.arange(S), (B, S))
    hi = np.broadcast_to(np.arange(T) + S - T, (B, T))
    lo = np.where(rng.random((B, T)) < 0.2, 5, 0)
    codes = MaskCodes(*(jnp.asarray(x, jnp.int32) for x in (lo, hi, order, np.full((B, T), -1), np.full((B, S), -2))))
    first, last = np.full((B, R), 10**6), np.full((B, R), -1)
    for b, s in np.ndindex(B, S):
        if keys[b, s]:
            n = keys[b, s] - 1
            first[b, n], last[b, n] = min(first[b, n], s), max(last[b, n], s)
    before = np.where(rng.random((B, T)) < 0.2, np.iinfo(np.int32).min, hi)
    ints = [jnp.asarray(x, jnp.int32) for x in (first, last, before, keys)]
    routes = Routes(normal(B, T, K * G, h), normal(B, R, K, h), *ints, jnp.float32(dense))
    bias = PairBias(
        normal(B, T, K * G, 4),
        normal(B, S, K, 4),
        normal(B, T, K * G),
        normal(B, S, K),
        jnp.ones(K * G),
        jnp.ones((B, T, K * G), bool),
        jnp.asarray(keys > 0),
    )
    return q, k, v, codes, routes, bias


def bias_of_means(bias: PairBias, keys: np.ndarray) -> np.ndarray:
    """The gate of each query and the mean key of each region [B,K,G,T,R]."""
    found = np.zeros((B, K, G, T, R))
    u, w, row, key = (np.float64(x) for x in bias[:4])
    for b, group, g, t, n in np.ndindex(found.shape):
        mine, head = keys[b] == n + 1, group * G + g
        if mine.any():
            z = u[b, t, head] @ w[b, mine, group].mean(0) + row[b, t, head] + key[b, mine, group].mean()
            found[b, group, g, t, n] = np.log(2 / (1 + np.exp(-z)))
    return found


def allowed(codes: MaskCodes, routes: Routes, rule: RouteRule, bias: PairBias) -> tuple[np.ndarray, np.ndarray]:
    """Which keys each query and head sees [B,H,T,S], and tau log softmax of the chosen regions' keys, by the rule's
    words."""
    lo, hi, order, _, _ = (np.asarray(x) for x in codes)
    found, soft = np.zeros((B, K * G, T, S), bool), np.zeros((B, K * G, T, S))
    keys, first, last, before = (np.asarray(x) for x in (routes.keys, routes.first, routes.last, routes.before))
    queries = np.float64(routes.query).reshape(B, T, K, G, -1)
    scores = np.einsum("BTKGc,BRKc->BKGTR", queries, np.float64(routes.descriptor))
    if rule.with_bias:
        scores = scores + bias_of_means(bias, keys) * h**0.5
    if rule.share == "group":
        scores = np.broadcast_to(scores.sum(2, keepdims=True), scores.shape)
    scores = scores.reshape(B, K * G, T, R)
    for b, head, t in np.ndindex(B, K * G, T):
        able = [n for n in range(R) if first[b, n] <= last[b, n] and lo[b, t] <= last[b, n] < before[b, t]]
        target = min(len(able), rule.top_k) if rule.top_k >= 1 else np.ceil(round(rule.top_k * len(able), 4))
        count = int(target + np.ceil(float(routes.dense) * (len(able) - target)))
        mine = scores[b, head, t]
        best = sorted(able, key=lambda n: (-mine[n], n))[:count]
        total = np.log(np.exp(mine[able]).sum()) if able else 0.0
        for s in range(S):
            region = keys[b, s] - 1
            shut = region in able and region not in best
            found[b, head, t, s] = lo[b, t] <= order[b, s] <= hi[b, t] and not shut
            soft[b, head, t, s] = rule.tau * (mine[region] - total) if region in best else 0
    return found, soft


def dense_attention(q, k, v, bias, open_, added=0.0):
    """Softmax over the open keys in float64."""
    k, v = (np.repeat(np.float64(x), G, axis=2) for x in (k, v))
    scores = np.einsum("BTHh,BSHh->BHTS", np.float64(q), k) * h**-0.5
    z = np.einsum("BTHr,BSHr->BHTS", np.float64(bias.u), np.repeat(np.float64(bias.w), G, axis=2))
    z = z + np.moveaxis(np.float64(bias.row), 2, 1)[..., None]
    z = z + np.moveaxis(np.repeat(np.float64(bias.key), G, axis=2), 2, 1)[:, :, None]
    scores = scores + np.where(np.asarray(bias.key_on)[:, None, None], np.log(2 / (1 + np.exp(-z))), 0) + added
    weights = np.where(open_, np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("BHTS,BSHh->BTHh", weights / np.where(total > 0, total, 1), v), np.log(total[..., 0])


RULES = [
    RouteRule(2),
    RouteRule(0.5, share="group"),
    RouteRule(1, share="head"),
    RouteRule(0.3),
    RouteRule(2, with_bias=True),
    RouteRule(0.5, share="group", with_bias=True),
    RouteRule(2, choice="soft_bias", tau=0.7),
    RouteRule(0.5, share="group", choice="soft_bias", with_bias=True),
]
FAST = (RULES[2], RULES[5], RULES[7])
"""Heads apart and together, whole numbers and parts, hard and soft, with a bias and without."""


@functools.partial(jax.jit, static_argnames=("rule", "implementation"))
def run(q, k, v, codes, routes, bias, rule, implementation="xla"):
    if rule.with_bias:
        routes = routes._replace(bias=RankBias.of(bias, routes.keys, R))
    routing = Routing(routes, rule)
    return routed.attention(q, k, v, codes, bias, FORM, routing=routing, scale=h**-0.5, implementation=implementation)


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=[pytest.mark.slow] * (rule not in FAST)) for rule in RULES], ids=str
)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), dense=st.sampled_from([0.0, 0.3, 1.0]))
def test_it_is_the_stated_rule(rule: RouteRule, seed: int, dense: float) -> None:
    q, k, v, codes, routes, bias = operands(seed, dense)
    out, lse = run(q, k, v, codes, routes, bias, rule)
    with np.errstate(divide="ignore"):
        open_, soft = allowed(codes, routes, rule, bias)
        expected, expected_lse = dense_attention(q, k, v, bias, open_, soft if rule.choice == "soft_bias" else 0.0)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(np.moveaxis(lse, 1, 2), expected_lse, atol=2e-5)
    if dense == 0:
        ended, _ = run(q, k, v, codes, routes._replace(dense=None), bias, rule)
        np.testing.assert_array_equal(ended, out)


def test_blocks_of_queries_are_all_queries_at_once(monkeypatch) -> None:
    """Outputs and the gradients of every float operand, a soft choice's among them."""
    args = operands(3)
    rule = RouteRule(2, choice="soft_bias", with_bias=True)
    monkeypatch.setattr(blocks, "MOST_SCORES", B * K * G * S * 8)

    def loss(floats, implementation):
        q, k, v, query, descriptor, bias = floats
        routes = args[4]._replace(query=query, descriptor=descriptor)
        bias = bias._replace(query_on=args[5].query_on, key_on=args[5].key_on)
        out, lse = run.__wrapped__(q, k, v, args[3], routes, bias, rule, implementation)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    bias = args[5]._replace(query_on=None, key_on=None)
    floats = (*args[:3], args[4].query, args[4].descriptor, bias)
    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (a, ga), (b, gb) = grad(floats, "xla"), grad(floats, "reference")
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    assert float(jnp.abs(ga[4]).max()) > 0


def test_no_map_of_all_pairs_is_kept_for_the_backward_pass() -> None:
    """Not even where all queries are one block."""
    n = 160
    q, k, v = (jnp.ones((1, n, heads, h)) for heads in (K * G, K, K))
    codes = MaskCodes(
        jnp.zeros((1, n), jnp.int32), *(jnp.arange(n)[None],) * 2, *(jnp.full((1, n), -x) for x in (1, 2))
    )
    routes = Routes(q, k[:, :4], jnp.arange(4)[None], jnp.arange(4)[None], codes.hi, codes.order % 5, None)

    def loss(q, k, v):
        out, _ = routed.attention(
            q, k, v, codes, routing=Routing(routes, RouteRule(2)), scale=1.0, implementation="xla"
        )
        return jnp.sum(out**2)

    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(loss, *x)[1], q, k, v))
    assert kept and all(sum(side >= n for side in x.shape) <= 1 for x in kept), [x.shape for x in kept]


def test_blocks_are_of_what_a_device_has() -> None:
    assert blocks._maps(4, 6) == 24
    with use_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        assert blocks._maps(4, 6) == 6
        assert blocks._maps(3, 6) == 9, "rows that the mesh does not divide are everywhere"


def test_all_regions_are_plain_attention_and_a_hard_choice_has_no_gradient() -> None:
    q, k, v, codes, routes, bias = operands(1)
    expected = plain(q, k, v, codes, bias, FORM, scale=h**-0.5, implementation="reference")
    for found in (
        run(q, k, v, codes, routes, bias, RouteRule(R)),
        run(q, k, v, codes, routes._replace(dense=jnp.float32(1)), bias, RouteRule(1)),
        run(q, k, v, codes, routes, bias, RouteRule(R, choice="straight_through")),
    ):
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)

    def loss(query, rule):
        return jnp.sum(run(q, k, v, codes, routes._replace(query=query), bias, rule)[0] ** 2)

    assert not jax.grad(loss)(routes.query, RouteRule(2)).any()
    assert jax.grad(loss)(routes.query, RouteRule(2, choice="straight_through")).any()


@pytest.mark.parametrize(
    ("choice", "share"),
    [
        pytest.param("soft_bias", "head", marks=pytest.mark.slow),
        pytest.param("straight_through", "group", marks=pytest.mark.slow),
        ("soft_bias", "group"),
        ("straight_through", "head"),
    ],
)
def test_soft_choices_have_the_slope_of_their_formula(choice, share) -> None:
    """Along a line through queries and descriptors, by differences: what is chosen stays, its log softmax moves."""
    q, k, v, codes, routes, bias = operands(5)
    rule, rng = RouteRule(3, share=share, choice=choice, tau=0.7), np.random.default_rng(0)
    ways = [rng.normal(size=x.shape) for x in (routes.query, routes.descriptor)]
    weight = rng.normal(size=(B, T, K * G, h))

    def loss(query, descriptor):
        moved = routes._replace(query=query, descriptor=descriptor)
        return jnp.sum(run(q, k, v, codes, moved, bias, rule)[0] * weight)

    open_, unmoved = allowed(codes, routes, rule, bias)

    def at(step: float) -> float:
        # The regions that are chosen are those without the step: a rule that takes all candidates gives every softmax.
        query, descriptor = (np.float64(x) + step * way for x, way in zip(routes[:2], ways, strict=True))
        moved = routes._replace(query=query, descriptor=descriptor)
        soft = np.where(unmoved != 0, allowed(codes, moved, RouteRule(R, share=share, tau=0.7), bias)[1], 0.0)
        added = soft if choice == "soft_bias" else soft - unmoved
        return float((dense_attention(q, k, v, bias, open_, added)[0] * weight).sum())

    slopes = jax.grad(loss, argnums=(0, 1))(*routes[:2])
    found = sum(float((slope * way).sum()) for slope, way in zip(slopes, ways, strict=True))
    assert found == pytest.approx((at(1e-4) - at(-1e-4)) / 2e-4, rel=1e-3)
    assert abs(found) > 0.1


def test_what_is_not_chosen_touches_nothing() -> None:
    """Values of shut regions may be anything; ties go to the lower region, never to more than k."""
    q, k, v, codes, routes, bias = operands(2)
    routes = routes._replace(descriptor=jnp.zeros_like(routes.descriptor), before=codes.hi)
    rule = RouteRule(1)
    open_ = jnp.asarray(allowed(codes, routes, rule, bias)[0])[:, :, -1].any(1)
    assert not open_.all()
    out, _ = run(q, k, v, codes, routes, bias, rule)
    poisoned = jnp.where(open_[:, :, None, None], v, 1e30)
    found, _ = run(q, k, poisoned, codes, routes, bias, rule)
    np.testing.assert_array_equal(out[:, -1], found[:, -1])


def test_masses_are_those_of_each_region_whatever_else_the_row_holds() -> None:
    """A key that nobody sees and that would take all the weight changes no choice."""
    q, k, v, codes, routes, bias = operands(4)
    rule = RouteRule(1, by="mass")
    far = codes._replace(order=codes.order.at[:, 0].set(10**6))
    keys = routes._replace(keys=routes.keys.at[:, 0].set(0))
    loud = bias._replace(key=bias.key.at[:, 0].set(1e4), key_on=bias.key_on.at[:, 0].set(True))
    linear = PairForm("linear")

    @jax.jit
    def of(bias):
        return routed.attention(
            q, k, v, far, bias, linear, routing=Routing(keys, rule), scale=h**-0.5, implementation="reference"
        )[0]

    np.testing.assert_array_equal(of(loud), of(bias._replace(key_on=loud.key_on)))


def test_wrong_operands_and_backends_are_one_clear_error() -> None:
    q, k, v, codes, routes, bias = operands(0)
    with pytest.raises(ValueError, match=r"descriptor has shape \(2, 5, 2, 8\), expected|first has shape"):
        run(q, k, v, codes, routes._replace(descriptor=routes.descriptor[:, 1:]), bias, RouteRule(1))
    with pytest.raises(ValueError, match="'pallas_tpu' cannot serve routed attention"):
        run(q, k, v, codes, routes, bias, RouteRule(1), implementation="pallas_tpu")
    ranked = routes._replace(bias=RankBias.of(bias, routes.keys, R))
    with pytest.raises(ValueError, match="has a bias to rank by beside a rule of with_bias = False"):
        run(q, k, v, codes, ranked, bias, RouteRule(1))
    for wrong in (0, -1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="top_k"):
            RouteRule(wrong)
