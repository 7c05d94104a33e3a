"""What every backend of routed attention must do. The tests of a backend are a subclass that names it.

`RoutedBackend` holds a backend against the stated rule in numpy, with hard choices by descriptors. `BesideTheOracle`
compares with `reference` number by number, and `FurtherChoices` has what the TPU kernels do not serve: soft choices,
and ranking by mass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax.kernels import routed
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.attention import attention as plain
from rave_jax.kernels.attention.base import NOWHERE
from rave_jax.kernels.routed import RouteRule, Routes, Routing, of_regions
from rave_jax.kernels.support import interpreted
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.kernels.drawn import PairBias, codes_of, term_of

FORM = "log_gate"
GROUP = RouteRule(2, share="group")
HARD = st.tuples(st.integers(0, 10_000), st.booleans(), st.sampled_from([0.0, 0.75, 1.0]))
"""Seed, whether intervals cut regions, and how many queries are routed."""


class Sizes(NamedTuple):
    """Of one call. Regions have at most `most_keys` keys."""

    B: int
    T: int
    S: int
    K: int
    G: int
    h: int
    R: int
    most_keys: int


class Drawn(NamedTuple):
    """Operands of a call, and cotangents of its output and log-sum-exp."""

    q: Any
    k: Any
    v: Any
    codes: MaskCodes
    routes: Routes
    bias: PairBias | None
    ct: Any


def drawn_for(d: Sizes, seed: int, *, cut: bool = True, part: float = 0.75, dense: float = 0.0, biased: bool) -> Drawn:
    """Queries are the last T of S tokens, a `part` of them routed. Regions of any size stand between keys of none, and
    have gaps. `cut` draws intervals that begin inside regions, and openings."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    keys, at = np.zeros((d.B, d.S), int), int(rng.integers(0, 4))
    for r in range(d.R):
        size = min(int(rng.integers(0, d.most_keys + 1)), d.S - at)
        keys[:, at : at + size] = r + 1
        at = min(d.S, at + size + int(rng.integers(0, 3)))
    keys = keys * (rng.random((d.B, d.S)) < 0.9)
    hi = np.broadcast_to(np.arange(d.T) + d.S - d.T, (d.B, d.T))
    lo = np.where(rng.random((d.B, d.T)) < 0.2 * cut, rng.integers(0, d.S, (d.B, d.T)), 0)
    open_q = np.where(rng.random((d.B, d.T)) < 0.1 * cut, rng.integers(0, 3, (d.B, d.T)), -1)
    open_k = np.where(rng.random((d.B, d.S)) < 0.1 * cut, rng.integers(0, 3, (d.B, d.S)), -2)
    before = np.where(rng.random((d.B, d.T)) < part, hi, NOWHERE)
    H = d.K * d.G
    bias = None
    if biased:
        bias = PairBias(
            *(normal(d.B, d.T, H, 4), normal(d.B, d.S, d.K, 4), normal(d.B, d.T, H), normal(d.B, d.S, d.K)),
            *(jnp.ones(H), jnp.ones((d.B, d.T, H), bool), jnp.asarray(keys > 0)),
        )
    return Drawn(
        *(normal(d.B, d.T, H, d.h), normal(d.B, d.S, d.K, d.h), normal(d.B, d.S, d.K, d.h)),
        codes_of(d.B, lo, hi, np.arange(d.S), open_q, open_k),
        routes_of(normal(d.B, d.T, H, d.h), normal(d.B, d.R, d.K, d.h), keys, before, dense),
        bias,
        (normal(d.B, d.T, H, d.h), normal(d.B, d.T, H)),
    )


def routes_of(query: Any, descriptor: Any, keys: np.ndarray, before: Any, dense: float = 0.0) -> Routes:
    """Routes over keys whose order is their place in the row."""
    (B, R), keys = descriptor.shape[:2], np.broadcast_to(keys, (query.shape[0], keys.shape[1]))
    first, last = np.full((B, R), 10**6), np.full((B, R), -1)
    for b, s in zip(*np.nonzero(keys), strict=True):
        n = keys[b, s] - 1
        first[b, n], last[b, n] = min(first[b, n], s), max(last[b, n], s)
    ints = (jnp.asarray(x, jnp.int32) for x in (first, last, before, keys))
    return Routes(query, descriptor, *ints, jnp.float32(dense))


def by_name(name: str, d: Sizes, drawn: Drawn, rule: RouteRule) -> Any:
    """The public function, whatever devices the backend is for."""
    q, k, v, codes, routes, bias, _ = drawn
    terms = () if bias is None else (term_of(bias, FORM),)
    if rule.with_bias:
        routes = routes._replace(bias=of_regions(terms, routes.keys, d.R))
    routing = Routing(routes, rule, d.most_keys)
    with interpreted():
        return routed.attention(q, k, v, codes, terms, routing=routing, scale=d.h**-0.5, implementation=name)


BIAS = ("u", "w", "row", "key")


@functools.cache
def program(call: Callable[..., Any], name: str, d: Sizes, rule: RouteRule) -> Callable[..., Any]:
    """A compiled function of `Drawn`: output, log-sum-exp and the gradients of all float operands by name."""

    def everything(drawn: Drawn) -> Any:
        def of(floats: dict[str, Any]) -> Any:
            own = {x: floats[x] for x in ("q", "k", "v")}
            routes = drawn.routes._replace(query=floats["query"], descriptor=floats["descriptor"])
            bias = None if drawn.bias is None else drawn.bias._replace(**{x: floats[x] for x in BIAS})
            return call(name, d, drawn._replace(**own, routes=routes, bias=bias), rule)

        floats = {x: getattr(drawn, x) for x in ("q", "k", "v")}
        floats |= {x: getattr(drawn.routes, x) for x in ("query", "descriptor")}
        if drawn.bias is not None:
            floats |= {x: getattr(drawn.bias, x) for x in BIAS}
        (out, lse), pull = jax.vjp(of, floats)
        return out, lse, pull((drawn.ct[0], jnp.where(jnp.isfinite(lse), drawn.ct[1], 0.0)))[0]

    return jax.jit(everything)


class RoutedBackend:
    """What holds for every backend.

    Attributes:
        name: the backend, as configs name it.
        sizes: of all calls.
        rules: by which queries choose, for the comparison with the stated rule.
        biased: do the draws have a pair bias? A kernel takes longer to compile with one.
        call: (name, sizes, `Drawn`, rule) -> results; by default the public function.
        slow: tests that take long for this backend, see `conftest.py`.
    """

    name: ClassVar[str]
    sizes: ClassVar[Sizes]
    rules: ClassVar[Collection[RouteRule]] = (GROUP,)
    biased: ClassVar[bool] = False
    call: ClassVar[Callable[..., Any]] = staticmethod(by_name)
    slow: ClassVar[Collection[str]] = ()

    def __init_subclass__(cls) -> None:
        missing = [name for name in cls.slow if not hasattr(cls, name.split("[")[0])]
        assert not missing, f"{cls.__name__}.slow names tests that it has not: {missing}"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "rule" in metafunc.fixturenames:
            metafunc.parametrize("rule", self.rules, ids=str)

    def drawn(self, seed: int, **how: Any) -> Drawn:
        return drawn_for(self.sizes, seed, **how, biased=self.biased)

    def results(self, drawn: Drawn, rule: RouteRule = GROUP) -> Any:
        """Output, log-sum-exp and gradients."""
        return program(type(self).call, self.name, self.sizes, rule)(drawn)

    def plain(self, drawn: Drawn) -> Any:
        """Attention to all keys, by the oracle."""
        how = {"scale": self.sizes.h**-0.5, "implementation": "reference"}
        terms = () if drawn.bias is None else (term_of(drawn.bias, FORM),)
        return jax.jit(functools.partial(plain, **how))(*drawn[:4], terms)

    def test_it_is_the_stated_rule(self, rule):
        @settings(max_examples=10)
        @given(HARD, st.sampled_from([0.0, 0.4, 1.0]))
        def holds(how: tuple[int, bool, float], dense: float) -> None:
            seed, cut, part = how
            given_ = self.drawn(seed, cut=cut, part=part, dense=dense)
            open_, soft = allowed(self.sizes, given_, rule)
            out, lse, _ = self.results(given_, rule)
            expected = dense_attention(given_, open_, soft if rule.choice == "soft_bias" else 0.0)
            near((out, np.moveaxis(lse, 1, 2)), expected)

        holds()

    def test_all_regions_are_plain_attention(self):
        given_ = self.drawn(1, dense=1.0)
        near(self.results(given_)[:2], self.plain(given_))

    def test_without_a_picture_it_is_plain_attention(self):
        given_ = self.drawn(2)
        keys = np.zeros((self.sizes.B, self.sizes.S), int)
        given_ = given_._replace(routes=routes_of(*given_.routes[:2], keys, given_.codes.hi))
        near(self.results(given_)[:2], self.plain(given_))

    def test_what_is_not_chosen_touches_nothing(self):
        """Values of shut regions may be anything, and their keys get no gradient. Ties go to lower regions."""
        given_ = self.drawn(3, cut=False, part=1.0)
        routes = given_.routes._replace(descriptor=jnp.zeros_like(given_.routes.descriptor))
        given_ = given_._replace(routes=routes)
        open_ = allowed(self.sizes, given_, GROUP)[0].any((1, 2))
        assert not open_.all()
        out, lse, grads = self.results(given_)
        loud = given_._replace(v=jnp.where(open_[..., None, None], given_.v, 1e30))
        for x, y in zip(self.results(loud)[:2], (out, lse), strict=True):
            np.testing.assert_array_equal(x, y)
        assert not grads["k"][~open_].any() and not grads["v"][~open_].any()

    def test_a_packed_row_is_its_documents(self):
        """Two documents in a row, each with its regions, against each alone."""
        d, given_ = self.sizes, self.drawn(6, cut=False)
        row, at = np.arange(d.T) + d.S - d.T, np.arange(d.S)
        cut = d.S - d.T // 2
        begins = cut - 8
        keys = np.where(at < d.S - d.T, np.asarray(given_.routes.keys), 0)
        keys[:, begins : cut - 2] = d.R
        codes = given_.codes._replace(
            lo=jnp.broadcast_to(jnp.where(row < cut, 0, begins), (d.B, d.T)).astype(jnp.int32)
        )
        query, descriptor = given_.routes[:2]
        packed = given_._replace(codes=codes, routes=routes_of(query, descriptor, keys, codes.hi))
        out, lse, _ = self.results(packed)
        # The second document alone: all keys of the first are of no region and out of reach.
        apart = np.where(at >= begins, keys, 0)
        alone = packed._replace(
            codes=codes._replace(order=jnp.where(at >= begins, codes.order, NOWHERE)),
            routes=routes_of(query, descriptor, apart, codes.hi),
        )
        found = self.results(alone)
        later = row >= cut
        near((out[:, later], lse[:, later]), (found[0][:, later], found[1][:, later]))

    @pytest.mark.slow
    @pytest.mark.parametrize("mesh", [(1, 2, 4), (1, 1, 2, 2)], ids=str)
    def test_a_mesh_changes_nothing(self, mesh):
        """Two rows and two kv heads, each of draws of its own and with a score term, over two devices each; the query
        heads of a kv head over two more. With four sizes, the last is of tokens."""
        d, call = self.sizes._replace(B=2, K=2), type(self).call
        given_ = drawn_for(d, 8, biased=True)
        alone = program(call, self.name, d, GROUP)(given_)
        with use_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: math.prod(mesh)])):
            split = program.__wrapped__(call, self.name, d, GROUP)(given_)
        near(split, alone)

    def test_operands_that_do_not_fit_are_named(self):
        given_ = self.drawn(0)
        routes = given_.routes._replace(descriptor=given_.routes.descriptor[:, 1:])
        with pytest.raises(ValueError, match="operand first has shape"):
            by_name(self.name, self.sizes, given_._replace(routes=routes), GROUP)
        with pytest.raises(ValueError, match="no bias to rank by beside a rule of with_bias = True"):
            rule = RouteRule(1, share="group", with_bias=True)
            by_name(self.name, self.sizes, given_._replace(bias=None), rule)


class BesideTheOracle(RoutedBackend):
    """What is compared with the oracle, `reference`, as well."""

    def test_every_gradient_is_the_oracles(self, rule):
        @settings(max_examples=8)
        @given(HARD, st.sampled_from([0.0, 0.4]))
        def holds(how: tuple[int, bool, float], dense: float) -> None:
            seed, cut, part = how
            given_ = self.drawn(seed, cut=cut, part=part, dense=dense)
            near(self.results(given_, rule), program(by_name, "reference", self.sizes, rule)(given_))

        holds()


class FurtherChoices(RoutedBackend):
    """Soft choices and ranking by mass, which kernels that skip regions may refuse."""

    def test_a_hard_choice_has_no_gradient(self):
        gradients = self.results(self.drawn(1))[2]
        assert not gradients["query"].any() and not gradients["descriptor"].any()

    @pytest.mark.parametrize(
        ("choice", "share"),
        [
            pytest.param("soft_bias", "head", marks=pytest.mark.slow),
            pytest.param("straight_through", "group", marks=pytest.mark.slow),
            ("soft_bias", "group"),
            ("straight_through", "head"),
        ],
    )
    def test_soft_choices_have_the_slope_of_their_formula(self, choice, share):
        """Along a line through queries and descriptors, by differences: what is chosen stays, its log softmax moves."""
        d, given_ = self.sizes, self.drawn(5, cut=False)
        rule, rng = RouteRule(3, share=share, choice=choice, tau=0.7), np.random.default_rng(0)
        ways = [rng.normal(size=x.shape) for x in given_.routes[:2]]
        given_ = given_._replace(ct=(given_.ct[0], jnp.zeros_like(given_.ct[1])))
        open_, unmoved = allowed(d, given_, rule)

        def at(step: float) -> float:
            # The regions that are chosen are those without the step: a rule of all candidates gives every softmax.
            query, descriptor = (np.float64(x) + step * way for x, way in zip(given_.routes[:2], ways, strict=True))
            moved = given_._replace(routes=given_.routes._replace(query=query, descriptor=descriptor))
            soft = np.where(unmoved != 0, allowed(d, moved, RouteRule(d.R, share=share, tau=0.7))[1], 0.0)
            added = soft if choice == "soft_bias" else soft - unmoved
            return float((dense_attention(given_, open_, added)[0] * np.asarray(given_.ct[0])).sum())

        gradients = self.results(given_, rule)[2]
        found = sum(float((gradients[n] * way).sum()) for n, way in zip(("query", "descriptor"), ways, strict=True))
        assert found == pytest.approx((at(1e-4) - at(-1e-4)) / 2e-4, rel=1e-3)
        assert abs(found) > 0.1

    def test_masses_are_those_of_each_region_whatever_else_the_row_holds(self):
        """A key that nobody sees and that would take all the weight changes no choice."""
        q, k, v, codes, routes, bias, _ = self.drawn(4)
        far = codes._replace(order=codes.order.at[:, 0].set(10**6), open_k=codes.open_k.at[:, 0].set(-2))
        routing = Routing(routes._replace(keys=routes.keys.at[:, 0].set(0)), RouteRule(1, by="mass"))
        loud = bias._replace(key=bias.key.at[:, 0].set(1e4), key_on=bias.key_on.at[:, 0].set(True))
        how = {"routing": routing, "scale": self.sizes.h**-0.5, "implementation": self.name}
        run = jax.jit(lambda bias: routed.attention(q, k, v, far, [term_of(bias, "linear")], **how)[0])
        np.testing.assert_array_equal(run(loud), run(bias._replace(key_on=loud.key_on)))


def near(found: Any, expected: Any, atol: float = 2e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), found, expected)


def bias_of_means(d: Sizes, bias: PairBias, keys: np.ndarray) -> np.ndarray:
    """The gate of each query and the mean key of each region [B,K,G,T,R]."""
    found = np.zeros((d.B, d.K, d.G, d.T, d.R))
    u, w, row, key = (np.float64(x) for x in bias[:4])
    for b, group, g, t, n in np.ndindex(found.shape):
        mine, head = keys[b] == n + 1, group * d.G + g
        if mine.any():
            z = u[b, t, head] @ w[b, mine, group].mean(0) + row[b, t, head] + key[b, mine, group].mean()
            found[b, group, g, t, n] = np.log(2 / (1 + np.exp(-z)))
    return found


def allowed(d: Sizes, drawn: Drawn, rule: RouteRule) -> tuple[np.ndarray, np.ndarray]:
    """Which keys each query and head sees [B,H,T,S], and tau log softmax of the chosen regions' keys, by the rule's
    words."""
    routes = drawn.routes
    lo, hi, order, open_q, open_k = (np.asarray(x) for x in drawn.codes)
    reach = (lo[..., None] <= order[:, None]) & (order[:, None] <= hi[..., None])
    reach |= open_q[..., None] == open_k[:, None]
    found, soft = (np.zeros((d.B, d.K * d.G, d.T, d.S), kind) for kind in (bool, float))
    keys, first, last, before = (np.asarray(x) for x in (routes.keys, routes.first, routes.last, routes.before))
    queries = np.float64(routes.query).reshape(d.B, d.T, d.K, d.G, -1)
    scores = np.einsum("BTKGc,BRKc->BKGTR", queries, np.float64(routes.descriptor))
    if rule.with_bias and drawn.bias is not None:
        scores = scores + bias_of_means(d, drawn.bias, keys) * d.h**0.5
    if rule.share == "group":
        scores = np.broadcast_to(scores.sum(2, keepdims=True), scores.shape)
    scores = scores.reshape(d.B, d.K * d.G, d.T, d.R)
    for b, head, t in np.ndindex(d.B, d.K * d.G, d.T):
        able = [n for n in range(d.R) if first[b, n] <= last[b, n] and lo[b, t] <= last[b, n] < before[b, t]]
        target = min(len(able), rule.top_k) if rule.top_k >= 1 else np.ceil(round(rule.top_k * len(able), 4))
        # In float32, as the schedule is: 0.4 of five regions are two.
        count = int(target + np.ceil(np.float32(routes.dense) * np.float32(len(able) - target)))
        mine = scores[b, head, t]
        best = sorted(able, key=lambda n: (-mine[n], n))[:count]
        total = np.log(np.exp(mine[able]).sum()) if able else 0.0
        # Of each region, and of none (the last).
        shut, weight = np.zeros(d.R + 1, bool), np.zeros(d.R + 1)
        shut[[n for n in able if n not in best]] = True
        weight[best] = rule.tau * (mine[best] - total)
        found[b, head, t] = reach[b, t] & ~shut[keys[b] - 1]
        soft[b, head, t] = weight[keys[b] - 1]
    return found, soft


def dense_attention(drawn: Drawn, open_: np.ndarray, added: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over the open keys in float64: output, and log-sum-exp [B,H,T]."""
    bias, G = drawn.bias, drawn.q.shape[2] // drawn.k.shape[2]
    k, v = (np.repeat(np.float64(x), G, axis=2) for x in (drawn.k, drawn.v))
    scores = np.einsum("BTHh,BSHh->BHTS", np.float64(drawn.q), k) * k.shape[-1] ** -0.5 + added
    if bias is not None:
        z = np.einsum("BTHr,BSHr->BHTS", np.float64(bias.u), np.repeat(np.float64(bias.w), G, axis=2))
        z = z + np.moveaxis(np.float64(bias.row), 2, 1)[..., None]
        z = z + np.moveaxis(np.repeat(np.float64(bias.key), G, axis=2), 2, 1)[:, :, None]
        scores = scores + np.where(np.asarray(bias.key_on)[:, None, None], np.log(2 / (1 + np.exp(-z))), 0)
    weights = np.where(open_, np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return np.einsum("BHTS,BSHh->BTHh", weights / np.where(total > 0, total, 1), v), np.log(total[..., 0])
