"""Attention with score terms: the oracle against formulas, the blockwise backend against it, and the operands."""

from __future__ import annotations

from types import MappingProxyType

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax.kernels.attention import OPERATION, KeyGroups, attention
from rave_jax.kernels.attention.base import tile_allow
from tests.kernels.attention_backend import EVERY_GRADIENT, AttentionBackend, BackendBesideTheOracle, Case
from tests.kernels.drawn import FORMS, Dims, codes_of, random_codes, random_operands, term_of

B, H, K, h, c, r = 2, 4, 2, 8, 6, 4  # c: width of values
SHAPES = ((1, 1), (7, 300), (300, 300))


def dims(T: int, S: int) -> Dims:
    return Dims(B, T, S, K, H // K, h, c, r)


class TestReference(AttentionBackend):
    name = "reference"
    cases = MappingProxyType({"usual": Case(dims(300, 300), key_bias=True)})
    keeps_a_map = True
    slow = ("test_a_mesh_changes_nothing",)


XLA_CASES = {"usual": Case(dims(300, 300), key_bias=True)} | {
    f"{T} x {S}, {form or 'plain'}{', a term for each key' if per_key else ''}": Case(
        dims(T, S), form, key_bias=per_key
    )
    for T, S in SHAPES
    for form in (*FORMS, None)
    for per_key in (False, True)
    if (T, S, form, per_key) != (300, 300, "log_gate", True)
}
FAST = (
    "usual",
    "300 x 300, tanh",
    "300 x 300, linear",
    "300 x 300, centered_sigmoid, a term for each key",
    "300 x 300, plain, a term for each key",
    "7 x 300, log_gate",
    "1 x 1, plain, a term for each key",
)
"""Each form, each shape, and with and without a term for each key. The others are slow: two programs for each."""


class TestXla(BackendBesideTheOracle):
    name = "xla"
    cases = XLA_CASES
    slow = tuple(f"{EVERY_GRADIENT}[{case}]" for case in XLA_CASES if case not in FAST)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_mask_is_the_stated_predicate(seed):
    codes = random_codes(np.random.default_rng(seed), B, 5, 9)
    lo, hi, order, open_q, open_k = (np.asarray(x) for x in codes)
    allow = np.asarray(tile_allow(codes))[:, 0, 0]
    for b, i, j in np.ndindex(B, 5, 9):
        assert allow[b, i, j] == (lo[b, i] <= order[b, j] <= hi[b, i] or open_q[b, i] == open_k[b, j])


def test_a_row_whose_keys_all_have_a_bias_of_minus_10000_has_gradients_to_three_digits():
    """Of a lower bias its log-sum-exp has too few digits: docs/your_attention.md says so."""
    rng, d = np.random.default_rng(0), dims(6, 6)
    q, k, v, _ = random_operands(rng, d, 0.5)
    place = np.arange(6)
    codes = codes_of(B, 0 * place, place, place, 0 * place - 1, 0 * place - 2)
    hidden = jnp.where(jnp.arange(6) < 3, -1e4, 0.0)[None, :, None] * jnp.ones((B, 6, H))

    def gradients(implementation):
        def loss(*operands):
            out, _ = attention(*operands, codes, scale=0.3, key_bias=hidden, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for found, expected in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3 * float(jnp.abs(expected).max()))


def test_operands_that_do_not_fit_are_named():
    rng = np.random.default_rng(4)
    q, k, v, bias = random_operands(rng, dims(7, 9), 0.5)
    codes = random_codes(rng, B, 7, 9)
    term = term_of(bias, "centered_sigmoid")

    def changed(**operands):
        return attention(q, k, v, codes, [term.replace(**operands)], scale=1.0)

    with pytest.raises(ValueError, match=r"terms\[0\]\.w has shape \(2, 8, 2, 6\), expected \(2, 9, 2, 6\)"):
        changed(w=term.w[:, :-1])
    with pytest.raises(ValueError, match=r"terms\[0\]\.key\['at'\] has shape \(2, 9\), expected \(2, 9, 2\)"):
        changed(key={"at": jnp.zeros((2, 9))})
    with pytest.raises(ValueError, match=r"terms\[0\] has u alone, expected both u and w or neither"):
        changed(w=None)
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
    with pytest.raises(ValueError, match=r"head\['gain'\] is bfloat16, expected float32"):
        changed(head={"gain": bias.gain.astype(jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"terms\[0\]\.key_on is float32, expected bool"):
        changed(key_on=bias.key_on.astype(jnp.float32))
    with pytest.raises(ValueError, match="0 key groups, expected at least 1"):
        attention(q, k, v, codes, scale=1.0, key_groups=KeyGroups(codes.order, 0))
    with pytest.raises(ValueError, match="an array as its scale"):
        attention(q, k, v, codes, scale=jnp.float32(1))
    with pytest.raises(ValueError, match="'flash'"):
        OPERATION.choose("flash", q, k, v)
    with pytest.raises(ValueError, match="nan as its scale, expected a number"):
        attention(q, k, v, codes, scale=float("nan"))
    with pytest.raises(ValueError, match=r"terms\[0\]\.u has shape \(2, 7, 4, 0\), expected \[2, 7, 4, rank\]"):
        changed(u=term.u[..., :0], w=term.w[..., :0])
