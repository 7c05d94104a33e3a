"""Rematerialisation by name: the same loss and gradients, and what is computed a second time."""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rave_jax.kernels import attention as attention_kernels
from rave_jax.kernels.attention import MaskCodes
from rave_jax.models.config import ModelOptions, Remat
from rave_jax.models.layers import Linear
from rave_jax.models.stack import POLICIES, LayerRun

WIDTH, TOKENS = 8, 16


class SmallLayer(nnx.Module):
    """x + output(attention(x, x, x)) of one head, between two linears."""

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key)
        kind = jnp.dtype(jnp.float32)
        axes = (None, None)
        self.into = Linear((WIDTH,), (WIDTH,), axes, bias=False, dtype=kind, key=keys[0])
        self.output = Linear((WIDTH,), (WIDTH,), axes, bias=False, dtype=kind, key=keys[1])

    def __call__(self, x: jax.Array, codes: MaskCodes) -> jax.Array:
        heads = jnp.tanh(self.into(x))[:, :, None]
        out, _ = attention_kernels.attention(heads, heads, heads, codes, scale=1.0, implementation="xla")
        return x + self.output(out[:, :, 0])


def loss(run: Any, x: jax.Array, remat: Remat) -> jax.Array:
    row = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (len(x), TOKENS))
    codes = MaskCodes(lo=0 * row, hi=row, order=row, open_q=0 * row - 1, open_k=0 * row - 2)
    y, _ = run.scan(lambda layer, x, _, codes: (layer(x, codes), None), x, None, codes, remat)
    return jnp.sum(y**2)


@functools.cache
def given() -> tuple[Any, jax.Array]:
    run = LayerRun(0, 2, SmallLayer, jax.random.split(jax.random.key(0), 2))
    return run, jax.random.normal(jax.random.key(1), (2, TOKENS, WIDTH))


@functools.cache
def found(remat: Remat) -> Any:
    return jax.jit(jax.value_and_grad(functools.partial(loss, remat=remat), (0, 1)))(*given())


def test_every_name_has_a_policy() -> None:
    assert set(POLICIES) == set(get_args(Remat)) - {"none"}


SLOW = ("dots", "dots_and_attention", "all_dots")


@pytest.mark.parametrize("remat", [pytest.param(r, marks=pytest.mark.slow if r in SLOW else ()) for r in POLICIES])
def test_loss_and_gradients_are_those_without(remat: Remat) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found(remat), found("none"))


def matmuls(jaxpr: Any) -> int:
    """Products in a program, each loop's body once."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == "dot_general"
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            total += matmuls(inner) if hasattr(inner, "eqns") else 0
    return total


def test_what_is_multiplied_again() -> None:
    """Beyond the two linears and two products of attention forward, and their gradients."""
    counts = {
        remat: matmuls(jax.make_jaxpr(jax.grad(functools.partial(loss, remat=remat), (0, 1)))(*given()).jaxpr)
        for remat in get_args(Remat)
    }
    again = {remat: count - counts["none"] for remat, count in counts.items()}
    # Two linears and the two products of attention. (The compiler drops the second linear, which no gradient needs.)
    assert again == {
        "none": 0,
        "full": 4,
        "offload": 4,
        "dots": 2,
        "attention": 2,
        "dots_and_attention": 0,
        "all_dots": 0,
    }


def test_the_tower_may_keep_something_else() -> None:
    assert ModelOptions(remat="full").tower_remat == "full"
    assert ModelOptions(remat="dots", vision_remat="full").tower_remat == "full"
