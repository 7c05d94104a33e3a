"""Attention with pair bias: the blockwise backend against the dense oracle, and both against stated rules."""

from __future__ import annotations

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax.config import ConfigError
from rave_jax.kernels.attention import OPERATION, KeyGroups, PairForm, attention
from rave_jax.kernels.attention.base import LOG_GATE_FLOOR, log_gate, tile_allow
from rave_jax.kernels.support import interpreted
from tests.kernels.drawn import FORMS, Dims, codes_of, random_codes, random_cotangents, random_key_bias, random_operands

B, H, K, h, c, r = 2, 4, 2, 8, 6, 4  # c: width of values
NUM_GROUPS = 4
SHAPES = ((1, 1), (7, 300), (300, 300))


def dims(T: int, S: int) -> Dims:
    return Dims(B, T, S, K, H // K, h, c, r)


@functools.partial(jax.jit, static_argnames=("form", "implementation"))
def outputs_and_gradients(q, k, v, bias, key_bias, codes, ct, form, implementation, groups=None):
    """Output, log-sum-exp and the gradient of every float operand for one random pair of cotangents."""

    def run(q, k, v, floats, key_bias):
        full = None if bias is None else bias._replace(**floats)
        of = None if groups is None else KeyGroups(groups, NUM_GROUPS)
        return attention(
            q,
            k,
            v,
            codes,
            full,
            PairForm(form),
            scale=h**-0.5,
            key_bias=key_bias,
            key_groups=of,
            implementation=implementation,
        )

    floats = {} if bias is None else {n: getattr(bias, n) for n in ("u", "w", "row", "key", "gain")}
    (out, lse), pull = jax.vjp(run, q, k, v, floats, key_bias)
    d_lse = jnp.where(jnp.isfinite(lse), ct[1], 0.0)
    return out, lse, pull((ct[0], d_lse))


FAST = (
    *(((300, 300), False, form) for form in ("log_gate", "tanh", "linear")),
    *(((300, 300), True, form) for form in ("centered_sigmoid", None)),
    ((7, 300), True, "log_gate"),
    ((1, 1), True, None),
)
"""Each form, each shape, and with and without a term for each key. The others are slow: two programs for each."""


@pytest.mark.parametrize(
    ("shape", "per_key", "form"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] * (each not in FAST))
        for each in itertools.product(SHAPES, (False, True), (*FORMS, None))
    ],
    ids=str,
)
def test_xla_equals_reference_with_every_gradient(shape, form, per_key):
    rng = np.random.default_rng(SHAPES.index(shape))
    T, S = shape
    for visual in (0.0, 0.6, 1.0) if form == "log_gate" else (0.6,):
        q, k, v, bias = random_operands(rng, dims(T, S), visual)
        operands = (q, k, v, bias if form else None, random_key_bias(rng, dims(T, S)) if per_key else None)
        rest = (random_codes(rng, B, T, S), random_cotangents(rng, dims(T, S)), form or "linear")
        expected = outputs_and_gradients(*operands, *rest, "reference")
        found = outputs_and_gradients(*operands, *rest, "xla")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_key_groups_are_what_their_keys_alone_give_and_merge_to_the_whole(implementation):
    rng = np.random.default_rng(5)
    T, S = 7, 300
    q, k, v, bias = random_operands(rng, dims(T, S), 0.5)
    key_bias, codes = random_key_bias(rng, dims(T, S)), random_codes(rng, B, T, S)
    of = jnp.asarray(rng.integers(0, NUM_GROUPS - 1, (B, S)), jnp.int32)  # the last one stays empty
    rest = (codes, random_cotangents(rng, dims(T, S), NUM_GROUPS), "log_gate")
    out, lse, grads = outputs_and_gradients(q, k, v, bias, key_bias, *rest, implementation, of)
    assert np.all(np.asarray(out)[:, :, -1] == 0) and np.all(np.isneginf(np.asarray(lse)[:, :, -1]))
    for n in range(NUM_GROUPS):
        inside = np.asarray(of) == n
        alone, alone_lse = by_hand(q, k, v, codes, bias, key_bias, inside)
        np.testing.assert_allclose(out[:, :, n], alone, atol=2e-5)
        np.testing.assert_allclose(lse[:, :, n], alone_lse, atol=2e-5)
    run = jax.jit(functools.partial(attention, scale=h**-0.5, implementation=implementation))
    whole, _ = run(q, k, v, codes, bias, key_bias=key_bias)
    weights = jax.nn.softmax(lse, axis=2, where=jnp.isfinite(lse).any(2, keepdims=True))
    np.testing.assert_allclose((weights[..., None] * out).sum(2), whole, atol=2e-5)
    expected = outputs_and_gradients(q, k, v, bias, key_bias, *rest, "reference", of)[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), grads, expected)


def by_hand(q, k, v, codes, bias, key_bias, inside):
    """Attention over the keys in `inside`, in numpy and float64, one pair at a time in effect."""
    q, k, v, key_bias = (np.asarray(x, np.float64) for x in (q, k, v, key_bias))
    k, v = (np.repeat(x, H // K, axis=2) for x in (k, v))
    w, key = (np.repeat(np.asarray(x, np.float64), H // K, axis=2) for x in (bias.w, bias.key))
    z = np.einsum("BTHr,BSHr->BHTS", np.asarray(bias.u, np.float64), w)
    z += np.moveaxis(np.asarray(bias.row), 2, 1)[..., None] + np.moveaxis(key, 2, 1)[:, :, None]
    on = np.moveaxis(np.asarray(bias.query_on), 2, 1)[..., None] & np.asarray(bias.key_on)[:, None, None]
    scores = np.einsum("BTHh,BSHh->BHTS", q, k) * h**-0.5 + np.moveaxis(key_bias, 2, 1)[:, :, None]
    scores += np.where(on, np.log(2) - np.logaddexp(0, -z), 0)
    lo, hi, order, open_q, open_k = (np.asarray(x) for x in codes)
    allow = (lo[..., None] <= order[:, None]) & (order[:, None] <= hi[..., None])
    allow |= open_q[..., None] == open_k[:, None]
    weights = np.where((allow & inside[:, None])[:, None], np.exp(scores), 0)
    total = weights.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.nan_to_num(np.einsum("BHTS,BSHc->BTHc", weights, v) / np.moveaxis(total, 1, 2)[..., None])
        return out, np.moveaxis(np.log(total), 1, 2)


@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_rows_that_see_nothing_are_zero_with_finite_gradients(implementation):
    rng = np.random.default_rng(0)
    T = S = 300
    q, k, v, bias = random_operands(rng, dims(T, S), 0.5)
    codes = random_codes(rng, B, T, S)
    blind = jnp.zeros((B, T), bool).at[:, ::3].set(True)
    codes = codes._replace(
        lo=jnp.where(blind, S, codes.lo), hi=jnp.where(blind, -1, codes.hi), open_q=codes.open_q * 0 - 1
    )
    ct = (jnp.ones((B, T, H, c)), jnp.ones((B, T, H)))
    out, lse, grads = outputs_and_gradients(q, k, v, bias, None, codes, ct, "log_gate", implementation)
    assert np.all(np.asarray(out)[:, ::3] == 0) and np.all(np.isneginf(np.asarray(lse)[:, ::3]))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.all(np.asarray(grads[0])[:, ::3] == 0)


def test_extreme_gates_lose_no_row():
    """xla leaves the log gate out of a row's maximum."""
    rng = np.random.default_rng(7)
    T = S = 300
    q, k, v, bias = random_operands(rng, dims(T, S), 1.0)
    bias = bias._replace(row=jnp.where(jnp.arange(T)[:, None] % 2, -90.0, 200.0) + bias.row)
    operands = (q * 20, k, v, bias, None, random_codes(rng, B, T, S), random_cotangents(rng, dims(T, S)), "log_gate")
    found, expected = (outputs_and_gradients(*operands, name) for name in ("xla", "reference"))
    assert np.isfinite(expected[1]).any() and np.abs(expected[1][np.isfinite(expected[1])]).max() > 60
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_zero_pair_changes_no_bit(form):
    rng = np.random.default_rng(1)
    q, k, v, bias = random_operands(rng, dims(300, 300), 0.6)
    zero = bias._replace(w=bias.w * 0, row=bias.row * 0, key=bias.key * 0)
    codes = random_codes(rng, B, 300, 300)
    for implementation in ("reference", "xla"):
        plain = forward(q, k, v, codes, None, FORMS[0], implementation)
        for a, b in zip(plain, forward(q, k, v, codes, zero, form, implementation), strict=True):
            assert np.array_equal(a, b)


@functools.partial(jax.jit, static_argnames=("form", "implementation"))
def forward(q, k, v, codes, bias, form, implementation):
    return attention(q, k, v, codes, bias, PairForm(form), scale=0.3, implementation=implementation)


def test_xla_makes_no_array_of_queries_by_keys():
    T = 1024
    rng = np.random.default_rng(2)
    q, k, v, bias = random_operands(rng, dims(T, T), 0.6)
    codes = random_codes(rng, B, T, T)

    def loss(implementation, q, k, v, floats):
        out, lse = attention(q, k, v, codes, bias._replace(**floats), scale=0.3, implementation=implementation)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    floats = {n: getattr(bias, n) for n in ("u", "w", "row", "key", "gain")}

    def shapes(implementation):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(functools.partial(loss, implementation), (0, 1, 2, 3)))(
            q, k, v, floats
        )
        return set(all_shapes(jaxpr.jaxpr))

    def square(shape):
        return sum(n == T for n in shape) > 1

    assert any(map(square, shapes("reference"))), "the check sees the oracle's map"
    assert not any(map(square, shapes("xla")))


def all_shapes(jaxpr):
    """Shapes of every intermediate array, inner computations included."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_shapes(inner)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_mask_is_the_stated_predicate(seed):
    codes = random_codes(np.random.default_rng(seed), B, 5, 9)
    lo, hi, order, open_q, open_k = (np.asarray(x) for x in codes)
    allow = np.asarray(tile_allow(codes))[:, 0, 0]
    for b, i, j in np.ndindex(B, 5, 9):
        assert allow[b, i, j] == (lo[b, i] <= order[b, j] <= hi[b, i] or open_q[b, i] == open_k[b, j])


@pytest.mark.parametrize(("bad", "field"), [({"kind": "flat"}, "form"), ({"limit": float("inf")}, "limit")])
def test_a_form_that_is_none_is_refused(bad, field):
    with pytest.raises(ConfigError, match=field):
        PairForm(**bad)


def test_log_gate_is_accurate_everywhere_and_exact_at_zero():
    z = np.concatenate([-np.logspace(-6, 2.5, 200), np.logspace(-6, 2.5, 200)])
    expected = np.log(2.0) - np.logaddexp(0, -np.maximum(z, LOG_GATE_FLOOR))
    np.testing.assert_allclose(log_gate(jnp.asarray(z, jnp.float32)), expected, rtol=3e-6, atol=1e-7)
    assert float(log_gate(jnp.float32(0))) == 0.0
    slopes = jax.vmap(jax.grad(log_gate))(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(slopes, 1 / (1 + np.exp(np.minimum(z, 80))), rtol=1e-4, atol=1e-6)


def test_bfloat16_keeps_float32_statistics():
    rng = np.random.default_rng(3)
    q, k, v, bias = random_operands(rng, dims(300, 300), 0.6)
    codes = random_codes(rng, B, 300, 300)
    half = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    out, lse = forward(*half, codes, bias, "log_gate", "xla")
    expected, expected_lse = forward(*(x.astype(jnp.float32) for x in half), codes, bias, "log_gate", "reference")
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


@pytest.mark.parametrize("implementation", ("reference", "xla", "pallas_tpu"))
def test_an_interval_without_a_lower_end_reaches_no_key_that_is_nowhere(implementation):
    """Neither one that is so given, nor one out of its key group, nor one that a backend pads with."""
    rng = np.random.default_rng(6)
    T, S, seen = 7, 300, 200
    q, k, v, _ = random_operands(rng, dims(T, S), 0.5)
    least, largest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    order = np.where(np.arange(S) < seen, np.arange(S), least)
    codes = codes_of(B, np.full(T, least), np.full(T, largest), order, np.full(T, -1), np.full(S, -2))
    key_groups = KeyGroups(jnp.broadcast_to(jnp.arange(S) % 2, (B, S)).astype(jnp.int32), 2)
    with interpreted():
        run = jax.jit(lambda *x: attention(*x, scale=0.3, key_groups=key_groups, implementation=implementation))
        out, lse = run(q, k, v, codes)
    for n in range(2):
        inside = (np.arange(S) < seen) & (np.arange(S) % 2 == n)
        dots = 0.3 * np.einsum("BTHh,BSHh->BTHS", q, np.repeat(np.asarray(k)[:, inside], H // K, axis=2))
        np.testing.assert_allclose(lse[:, :, n], np.log(np.exp(dots).sum(-1)), atol=2e-5)
    assert np.isfinite(out).all()


def test_operands_that_do_not_fit_are_named():
    rng = np.random.default_rng(4)
    q, k, v, bias = random_operands(rng, dims(7, 9), 0.5)
    codes = random_codes(rng, B, 7, 9)
    with pytest.raises(ValueError, match=r"bias\.key has shape \(2, 8, 2\), expected \(2, 9, 2\)"):
        attention(q, k, v, codes, bias._replace(key=bias.key[:, :-1]), scale=1.0)
    with pytest.raises(ValueError, match=r"codes\.hi"):
        attention(q, k, v, codes._replace(hi=codes.hi[:, :-1]), scale=1.0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 kv heads"):
        attention(q[:, :, :3], k, v, codes, scale=1.0)
    with pytest.raises(
        ValueError, match=r"k has shape \(2, 0, 2, 8\), expected \[batch, tokens, heads, width\], none of them 0"
    ):
        attention(q, k[:, :0], v[:, :0], codes, scale=1.0)
    with pytest.raises(ValueError, match=r"q has shape \(7, 4, 8\), expected \[batch"):
        attention(q[0], k, v, codes, scale=1.0)
    with pytest.raises(ValueError, match=r"bias\.gain is bfloat16, expected float32"):
        attention(q, k, v, codes, bias._replace(gain=bias.gain.astype(jnp.bfloat16)), scale=1.0)
    with pytest.raises(ValueError, match=r"bias\.key_on is float32, expected bool"):
        attention(q, k, v, codes, bias._replace(key_on=bias.key_on.astype(jnp.float32)), scale=1.0)
    with pytest.raises(ValueError, match="0 key groups, expected at least 1"):
        attention(q, k, v, codes, scale=1.0, key_groups=KeyGroups(codes.order, 0))
    with pytest.raises(ValueError, match="an array as its scale"):
        attention(q, k, v, codes, scale=jnp.float32(1))
    with pytest.raises(ValueError, match="'flash'"):
        OPERATION.choose("flash", q, k, v)
    with pytest.raises(ValueError, match="nan as its scale, expected a number"):
        attention(q, k, v, codes, scale=float("nan"))
    with pytest.raises(ValueError, match=r"bias\.u has shape \(2, 7, 4, 0\), expected \[2, 7, 4, rank\]"):
        attention(q, k, v, codes, bias._replace(u=bias.u[..., :0], w=bias.w[..., :0]), scale=1.0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_operands_of_another_type_are_named(implementation):
    rng = np.random.default_rng(4)
    q, k, v, bias = random_operands(rng, dims(7, 9), 0.5)
    run = functools.partial(attention, scale=1.0, implementation=implementation)
    codes = random_codes(rng, B, 7, 9)
    with pytest.raises(ValueError, match="q is int32, expected float32, bfloat16"):
        run(q.astype(jnp.int32), k, v, codes)
    with pytest.raises(ValueError, match="v is bool, expected float32 as q"):
        run(q, k, v > 0, codes)
    with pytest.raises(ValueError, match="k is bfloat16, expected float32 as q"):
        run(q, k.astype(jnp.bfloat16), v, codes)
    for name, wrong in (("codes", tuple(codes)), ("bias", tuple(bias)), ("form", "tanh")):
        with pytest.raises(ValueError, match=f"operand {name} is of type (tuple|str), expected (MaskCodes|Pair)"):
            run(q, k, v, **{"codes": codes, "bias": bias, name: wrong})


def test_a_gate_that_is_wide_open_keeps_its_small_slope():
    """sigmoid(-z), which 1 - sigmoid(z) is not in float32: gates this open could not close again."""
    rng = np.random.default_rng(6)
    q, k, v, bias = random_operands(rng, dims(7, 300), 0.5)
    codes = codes_of(B, np.full(7, 0), np.full(7, 400), np.arange(300), np.full(7, -1), np.full(300, -2))
    bias = bias._replace(u=0 * bias.u, key=0 * bias.key, row=20 + bias.row, query_on=bias.query_on | True)
    ct = (jnp.asarray(rng.normal(size=(B, 7, H, c)), jnp.float32), jnp.zeros((B, 7, H)))
    # The operands of a test above, so that nothing is compiled again.
    rest = (jnp.zeros((B, 300, H)), codes, ct, "log_gate")

    def pull(implementation):
        _, _, (_, _, _, floats, _) = outputs_and_gradients(q, k, v, bias, *rest, implementation)
        return floats["row"]

    found, wanted = np.asarray(pull("xla")), np.asarray(pull("reference"))
    assert 0 < np.abs(wanted).max() < 1e-7
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
