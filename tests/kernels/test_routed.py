"""Routed attention: the mask form against the stated rule, and its blocks of queries against all queries at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rave_jax.kernels import routed
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.routed import RouteRule, Routes, Routing, of_regions
from rave_jax.kernels.routed import xla as blocks
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.kernels.drawn import term_of
from tests.kernels.routed_backend import FORM, BesideTheOracle, FurtherChoices, Sizes, by_name, drawn_for, near, program

SIZES = Sizes(B=2, T=24, S=56, K=2, G=2, h=8, R=6, most_keys=14)
RULES = (
    RouteRule(2),
    RouteRule(0.5, share="group"),
    RouteRule(1, share="head"),
    RouteRule(0.3),
    RouteRule(2, with_bias=True),
    RouteRule(0.5, share="group", with_bias=True),
    RouteRule(2, choice="soft_bias", tau=0.7),
    RouteRule(0.5, share="group", choice="soft_bias", with_bias=True),
)
FAST = (RULES[2], RULES[5], RULES[7])
"""Heads apart and together, whole numbers and parts, hard and soft, with a bias and without."""


class TestReference(FurtherChoices):
    name = "reference"
    sizes = SIZES
    rules = RULES
    biased = True
    slow = ("test_it_is_the_stated_rule",)


class TestXla(BesideTheOracle, FurtherChoices):
    name = "xla"
    sizes = SIZES
    rules = RULES
    biased = True
    slow = (
        *(f"test_it_is_the_stated_rule[{rule}]" for rule in RULES if rule not in FAST),
        "test_every_gradient_is_the_oracles",
    )


def test_blocks_of_queries_are_all_queries_at_once(monkeypatch) -> None:
    """Outputs and the gradients of every float operand, a soft choice's among them."""
    given = drawn_for(SIZES, 3, biased=True)
    rule = RouteRule(2, choice="soft_bias", with_bias=True)
    monkeypatch.setattr(blocks, "MOST_SCORES", SIZES.B * SIZES.K * SIZES.G * SIZES.S * 8)
    found, expected = (program.__wrapped__(by_name, name, SIZES, rule)(given) for name in ("xla", "reference"))
    near(found, expected, atol=1e-4)
    assert float(jnp.abs(found[2]["descriptor"]).max()) > 0


def test_all_regions_need_no_schedule_and_no_soft_choice() -> None:
    given = drawn_for(SIZES, 1, biased=True)
    expected = jax.jit(lambda x: by_name("xla", SIZES, x, RouteRule(SIZES.R)))(given)
    near(jax.jit(lambda x: by_name("xla", SIZES, x, RouteRule(SIZES.R, choice="straight_through")))(given), expected)
    ended = given._replace(routes=given.routes._replace(dense=None))
    near(jax.jit(lambda x: by_name("xla", SIZES, x, RouteRule(SIZES.R)))(ended), expected)


def test_no_map_of_all_pairs_is_kept_for_the_backward_pass() -> None:
    """Not even where all queries are one block."""
    n = 160
    q, k, v = (jnp.ones((1, n, heads, SIZES.h)) for heads in (SIZES.K * SIZES.G, SIZES.K, SIZES.K))
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


def test_wrong_operands_and_backends_are_one_clear_error() -> None:
    given = drawn_for(SIZES, 0, biased=True)
    with pytest.raises(ValueError, match="'pallas_tpu' cannot serve routed attention"):
        routed.attention(
            *given[:4], routing=Routing(given.routes, RouteRule(1)), scale=1.0, implementation="pallas_tpu"
        )
    ranked = given.routes._replace(bias=of_regions((term_of(given.bias, FORM),), given.routes.keys, SIZES.R))
    with pytest.raises(ValueError, match="has a bias to rank by beside a rule of with_bias = False"):
        by_name("xla", SIZES, given._replace(routes=ranked), RouteRule(1))
    for wrong in (0, -1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="top_k"):
            RouteRule(wrong)
