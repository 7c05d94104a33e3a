"""What every backend of attention must do. The tests of a backend are a subclass that names it.

    class TestXla(BackendBesideTheOracle):
        name = "xla"
        cases = {"usual": Case(Dims(...), "log_gate", key_bias=True), ...}

`AttentionBackend` holds a backend against formulas in numpy; the oracle is such a backend too. `BackendBesideTheOracle`
compares with the oracle number by number as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax.kernels.attention import KeyGroups, MaskCodes, attention
from rave_jax.kernels.support import interpreted
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.kernels.drawn import (
    FLOATS,
    FORMS,
    MASKS,
    Dims,
    PairBias,
    codes_of,
    drawn_codes,
    random_codes,
    random_cotangents,
    random_key_bias,
    random_operands,
    term_of,
)
from tests.kernels.score_terms import terms_of

NUM_GROUPS = 4
EVERY_GRADIENT = "test_every_result_and_gradient_is_the_oracles"
"""The test of each case, for `slow`."""


class Case(NamedTuple):
    """Sizes and settings of one program, which is compiled once, whatever numbers it gets."""

    dims: Dims
    form: str | None = "log_gate"
    """Names of the terms' functions joined by +, see `score_terms`; None has no term."""
    dtype: str = "float32"
    key_bias: bool = False
    settings: Any = None
    """What the backend's own function takes, such as sizes of blocks."""


class Drawn(NamedTuple):
    """Operands of a call, and cotangents of its output and log-sum-exp."""

    q: Any
    k: Any
    v: Any
    codes: MaskCodes
    bias: PairBias
    key_bias: Any
    ct: Any


def by_name(name: str, case: Case, *operands: Any, **more: Any) -> Any:
    """The public function, whatever devices the backend is for."""
    with interpreted():
        return attention(*operands, **more, implementation=name)


class AttentionBackend:
    """What holds for every backend.

    Attributes:
        name: the backend, as configs name it.
        cases: the programs that are compared. "usual" is one of them: log_gate, float32, with a term for each key.
        call: (name, case, operands of `attention`) -> its results; by default the public function.
        slow: tests that take long for this backend, see `conftest.py`.
        keeps_a_map: does it make arrays of queries by keys?
        tolerance: of float32, absolute and relative.
    """

    name: ClassVar[str]
    cases: ClassVar[Mapping[str, Case]]
    call: ClassVar[Callable[..., Any]] = staticmethod(by_name)
    slow: ClassVar[Collection[str]] = ()
    keeps_a_map: ClassVar[bool] = False
    tolerance: ClassVar[float] = 2e-5

    def __init_subclass__(cls) -> None:
        missing = [name for name in cls.slow if not hasattr(cls, name.split("[")[0])]
        assert not missing, f"{cls.__name__}.slow names tests that it has not: {missing}"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases.values(), ids=self.cases)

    @property
    def usual(self) -> Case:
        return self.cases["usual"]

    def run(self, *operands: Any, **more: Any) -> Any:
        """The public function with this backend."""
        return by_name(self.name, self.usual, *operands, **more)

    def gradients(self, case: Case, drawn: Drawn) -> Any:
        """Output, log-sum-exp and the gradient of every float operand."""
        return program(type(self).call, self.name, case)(drawn)

    def near(self, found: Any, expected: Any, tolerance: float | None = None) -> None:
        """Number by number in float32; in bfloat16 the error is small beside the whole array."""
        tolerance = tolerance or self.tolerance
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), found, expected)

    def test_it_is_the_stated_formula_and_its_slope(self):
        """Output and log-sum-exp in float64, and the slope along a random line through every float operand."""
        case, rng = self.usual, np.random.default_rng(0)
        given_ = drawn_for(case, rng, "opened", 0.6)
        out, lse, found = self.gradients(case, given_)
        scale = case.dims.h**-0.5
        expected, expected_lse = by_hand(given_, scale)
        self.near(out, expected)
        self.near(lse, expected_lse)
        start = floats_of(given_)
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), start)
        d_out, d_lse = (np.asarray(x) for x in given_.ct)

        def at(step: float) -> Any:
            moved = jax.tree.map(lambda x, to: np.float64(x) + step * to, start, way)
            out, lse = by_hand(with_floats(given_, moved), scale)
            return (out * d_out).sum() + (np.where(np.isfinite(lse), lse, 0) * d_lse).sum()

        slope = sum(jax.tree.leaves(jax.tree.map(lambda x, to: float((np.float64(x) * to).sum()), found, way)))
        assert slope == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-4)

    def test_key_groups_are_what_their_keys_alone_give_and_merge_to_the_whole(self):
        given_, groups = in_groups()
        out, lse, _ = grouped(self.name)(given_, groups)
        assert np.all(np.asarray(out)[:, :, -1] == 0) and np.all(np.isneginf(np.asarray(lse)[:, :, -1]))
        for n in range(NUM_GROUPS):
            alone, alone_lse = by_hand(given_, GROUPED.h**-0.5, np.asarray(groups) == n)
            self.near(out[:, :, n], alone)
            self.near(lse[:, :, n], alone_lse)
        whole, _ = by_hand(given_, GROUPED.h**-0.5)
        weights = jax.nn.softmax(lse, axis=2, where=jnp.isfinite(lse).any(2, keepdims=True))
        self.near((weights[..., None] * out).sum(2), whole)

    def test_rows_that_see_nothing_are_zero_with_finite_gradients(self):
        case = self.usual
        given_ = drawn_for(case, np.random.default_rng(0), "random", 0.5)
        blind, codes, S = jnp.arange(case.dims.T) % 3 == 0, given_.codes, case.dims.S
        codes = codes._replace(
            lo=jnp.where(blind, S, codes.lo), hi=jnp.where(blind, -1, codes.hi), open_q=codes.open_q * 0 - 1
        )
        ct = jax.tree.map(jnp.ones_like, given_.ct)
        out, lse, grads = self.gradients(case, given_._replace(codes=codes, ct=ct))
        assert np.all(np.asarray(out)[:, ::3] == 0) and np.all(np.isneginf(np.asarray(lse)[:, ::3]))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert np.all(np.asarray(grads["q"])[:, ::3] == 0)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_zero_pair_changes_no_bit(self, form):
        dims, rng = Dims(1, 130, 200, 1, 2, 32, 32, 8), np.random.default_rng(1)
        q, k, v, bias = random_operands(rng, dims, 0.6)
        zero = bias._replace(w=bias.w * 0, row=bias.row * 0, key=bias.key * 0)
        codes = random_codes(rng, dims.B, dims.T, dims.S)
        run = forward_of(self.name)
        for a, b in zip(run(q, k, v, codes, None, FORMS[0]), run(q, k, v, codes, zero, form), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_bfloat16_keeps_float32_statistics(self):
        dims, rng = Dims(1, 130, 200, 1, 2, 32, 32, 8), np.random.default_rng(3)
        q, k, v, bias = random_operands(rng, dims, 0.6)
        half = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
        codes = random_codes(rng, dims.B, dims.T, dims.S)
        out, lse = forward_of(self.name)(*half, codes, bias, "log_gate")
        assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
        expected, expected_lse = by_hand(Drawn(*half, codes, bias, None, None), SCALE)
        np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-4)

    def test_an_interval_without_a_lower_end_reaches_no_key_that_is_nowhere(self):
        """Neither one that is so given, nor one out of its key group, nor one that a backend pads with."""
        dims, seen, rng = Dims(2, 7, 300, 2, 2, 8, 6, 4), 200, np.random.default_rng(6)
        q, k, v, _ = random_operands(rng, dims, 0.5)
        least, largest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        order = np.where(np.arange(dims.S) < seen, np.arange(dims.S), least)
        codes = codes_of(
            dims.B, np.full(dims.T, least), np.full(dims.T, largest), order, np.full(dims.T, -1), np.full(dims.S, -2)
        )
        key_groups = KeyGroups(jnp.broadcast_to(jnp.arange(dims.S) % 2, (dims.B, dims.S)).astype(jnp.int32), 2)
        out, lse = jax.jit(lambda *x: self.run(*x, scale=0.3, key_groups=key_groups))(q, k, v, codes)
        for n in range(2):
            inside = (np.arange(dims.S) < seen) & (np.arange(dims.S) % 2 == n)
            dots = 0.3 * np.einsum("BTHh,BSHh->BTHS", q, np.repeat(np.asarray(k)[:, inside], dims.G, axis=2))
            np.testing.assert_allclose(lse[:, :, n], np.log(np.exp(dots).sum(-1)), atol=2e-5)
        assert np.isfinite(out).all()

    def test_operands_of_another_type_are_named(self):
        rng = np.random.default_rng(4)
        q, k, v, bias = random_operands(rng, Dims(2, 7, 9, 2, 2, 8, 6, 4), 0.5)
        codes = random_codes(rng, 2, 7, 9)
        with pytest.raises(ValueError, match="q is int32, expected float32, bfloat16"):
            self.run(q.astype(jnp.int32), k, v, codes, scale=1.0)
        with pytest.raises(ValueError, match="v is bool, expected float32 as q"):
            self.run(q, k, v > 0, codes, scale=1.0)
        with pytest.raises(ValueError, match="k is bfloat16, expected float32 as q"):
            self.run(q, k.astype(jnp.bfloat16), v, codes, scale=1.0)
        for name, wrong in (("codes", tuple(codes)), ("terms", (tuple(bias),))):
            with pytest.raises(
                ValueError, match=rf"operand {name}(\[0\])? is of type tuple, expected (MaskCodes|Term)"
            ):
                self.run(q, k, v, **{"codes": codes, "terms": (), name: wrong}, scale=1.0)

    def test_an_array_of_queries_by_keys_is_made_where_it_is_said_and_nowhere_else(self):
        """The oracle, which makes one, shows that this test sees it."""
        T = 1024
        case = Case(Dims(1, T, T, 2, 2, 8, 6, 4), key_bias=True)
        given_ = drawn_for(case, np.random.default_rng(2), "random", 0.6)
        jaxpr = jax.make_jaxpr(program.__wrapped__(by_name, self.name, case))(given_)
        shapes = set(all_shapes(jaxpr.jaxpr))
        assert any(sum(n == T for n in shape) > 1 for shape in shapes) == self.keeps_a_map

    @pytest.mark.parametrize(
        "mesh",
        [
            (2, 2, 2),
            (1, 1, 4, 2),
            *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((1, 2, 2), (2, 1, 4), (1, 8, 1), (1, 4, 1, 2))),
        ],
        ids=str,
    )
    def test_a_mesh_changes_nothing(self, mesh):
        """Rows, heads and (the fourth size) tokens over devices: also where the mesh splits query heads finer than
        there are kv heads (2)."""
        case = Case(Dims(8, 130, 200, 2, 2, 32, 32, 8), "log_gate+distance", key_bias=True)
        drawn = drawn_for(case, np.random.default_rng(2), "random", 0.6)
        alone = program(by_name, self.name, case)(drawn)
        with use_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: np.prod(mesh)])):
            split = program.__wrapped__(by_name, self.name, case)(drawn)
        self.near(split, alone)


class BackendBesideTheOracle(AttentionBackend):
    """What is compared with the oracle, `reference`, as well."""

    def expected(self, case: Case, given_: Drawn) -> Any:
        """The oracle's results in float32."""
        q, k, v = (x.astype(jnp.float32) for x in given_[:3])
        return program(by_name, "reference", case._replace(settings=None))(given_._replace(q=q, k=k, v=v))

    def compare(self, case: Case, given_: Drawn, found: Any = None) -> None:
        found, expected = found or self.gradients(case, given_), self.expected(case, given_)
        assert found[0].dtype == given_.q.dtype and found[1].dtype == jnp.float32
        np.testing.assert_array_equal(np.isfinite(found[1]), np.isfinite(expected[1]))
        if case.dtype == "float32":
            self.near(found, expected)
        tolerance = WHOLE[case.dtype]
        # The gradient of a head's number is a sum over all pairs, which cancel: their rounding does not.
        wide = tolerance * (3 if case.dtype == "bfloat16" else 1)
        for name, mine in found[2].items():
            near_as_a_whole(mine, expected[2][name], wide if name == "gain" else tolerance)
        jax.tree.map(functools.partial(near_as_a_whole, tolerance=tolerance), found[:2], expected[:2])

    def test_every_result_and_gradient_is_the_oracles(self, case):
        @given(st.integers(0, 2**31), st.sampled_from(MASKS), st.sampled_from((0.0, 0.6, 1.0)))
        @settings(max_examples=8)
        def holds(seed: int, mask: str, visual: float) -> None:
            self.compare(case, drawn_for(case, np.random.default_rng(seed), mask, visual))

        holds()

    def test_gradients_of_key_groups_are_the_oracles(self):
        given_, groups = in_groups()
        self.near(grouped(self.name)(given_, groups), grouped("reference")(given_, groups))

    def test_extreme_gates_lose_no_row(self):
        """A backend may leave the log gate out of a row's maximum."""
        case = self.usual
        given_ = drawn_for(case, np.random.default_rng(7), "random", 1.0)
        shut = jnp.arange(case.dims.T)[:, None] % 2
        bias = given_.bias._replace(row=jnp.where(shut, -90.0, 200.0) + given_.bias.row)
        given_ = given_._replace(q=given_.q * 20, bias=bias)
        found, expected = self.gradients(case, given_), self.expected(case, given_)
        seen = np.isfinite(expected[1])
        assert seen.any() and np.abs(expected[1][seen]).max() > 60
        self.near(found[:2], expected[:2], 5 * self.tolerance)
        jax.tree.map(functools.partial(near_as_a_whole, tolerance=WHOLE["float32"]), found, expected)

    def test_a_gate_that_is_wide_open_keeps_its_small_slope(self):
        """sigmoid(-z), which 1 - sigmoid(z) is not in float32: gates this open could not close again."""
        case = self.usual
        B, T, S = case.dims[:3]
        given_ = drawn_for(case, np.random.default_rng(6), "random", 0.5)
        codes = codes_of(B, np.full(T, 0), np.full(T, S), np.arange(S), np.full(T, -1), np.full(S, -2))
        bias = given_.bias
        bias = bias._replace(u=0 * bias.u, key=0 * bias.key, row=20 + bias.row, query_on=bias.query_on | True)
        ct = given_.ct[0], jnp.zeros_like(given_.ct[1])
        given_ = given_._replace(codes=codes, bias=bias, key_bias=jnp.zeros_like(given_.key_bias), ct=ct)
        found, wanted = (np.asarray(run(case, given_)[2]["row"]) for run in (self.gradients, self.expected))
        assert 0 < np.abs(wanted).max() < 1e-7
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


SCALE = 0.3
WHOLE = {"float32": 2e-5, "bfloat16": 1.5e-2}
"""The error of a whole array, beside its norm."""
GROUPED = Dims(1, 130, 200, 1, 2, 32, 32, 8)


def near_as_a_whole(found: Any, expected: Any, tolerance: float) -> None:
    """Both finite in the same places, and the error small beside the whole array (and beside one)."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    there = np.isfinite(expected)
    assert np.isfinite(found[there]).all()
    error = np.linalg.norm(found[there] - expected[there])
    assert error <= tolerance * (np.linalg.norm(expected[there]) + np.sqrt(there.sum()))


def drawn_for(case: Case, rng: np.random.Generator, mask: str, visual: float) -> Drawn:
    """Operands of a case: `visual` of the keys are switched on, and some of them are padding."""
    d = case.dims
    q, k, v, bias = random_operands(rng, d, visual, case.dtype)
    key_bias = random_key_bias(rng, d) if case.key_bias else None
    codes = drawn_codes(rng, mask, d.B, d.T, d.S, int(rng.integers(1, d.S + 1)))
    return Drawn(q, k, v, codes, bias, key_bias, random_cotangents(rng, d))


def floats_of(drawn: Drawn) -> dict[str, Any]:
    """The operands that have gradients."""
    bias = {name: getattr(drawn.bias, name) for name in FLOATS}
    return {"q": drawn.q, "k": drawn.k, "v": drawn.v, "key_bias": drawn.key_bias, **bias}


def with_floats(drawn: Drawn, floats: dict[str, Any]) -> Drawn:
    own = {name: floats[name] for name in ("q", "k", "v", "key_bias")}
    return drawn._replace(**own, bias=drawn.bias._replace(**{name: floats[name] for name in FLOATS}))


@functools.cache
def program(call: Callable[..., Any], name: str, case: Case) -> Callable[..., Any]:
    """A compiled function of `Drawn`: output, log-sum-exp and the gradients of all floats by name."""

    def everything(drawn: Drawn) -> Any:
        def of(floats: dict[str, Any]) -> Any:
            moved = with_floats(drawn, floats)
            terms = terms_of(moved.bias, case.form) if case.form else ()
            return call(name, case, *moved[:4], terms, scale=case.dims.h**-0.5, key_bias=moved.key_bias)

        (out, lse), pull = jax.vjp(of, floats_of(drawn))
        return out, lse, pull((drawn.ct[0].astype(out.dtype), jnp.where(jnp.isfinite(lse), drawn.ct[1], 0.0)))[0]

    return jax.jit(everything)


def in_groups() -> tuple[Drawn, Any]:
    """Operands and the groups of their keys, the last of which stays empty."""
    rng = np.random.default_rng(5)
    given_ = drawn_for(Case(GROUPED, key_bias=True), rng, "random", 0.5)
    groups = jnp.asarray(rng.integers(0, NUM_GROUPS - 1, (GROUPED.B, GROUPED.S)), jnp.int32)
    return given_._replace(ct=random_cotangents(rng, GROUPED, NUM_GROUPS)), groups


@functools.cache
def grouped(name: str) -> Callable[..., Any]:
    """`program` for each key group apart."""

    def everything(drawn: Drawn, groups: Any) -> Any:
        def call(name: str, case: Case, *operands: Any, **more: Any) -> Any:
            return by_name(name, case, *operands, **more, key_groups=KeyGroups(groups, NUM_GROUPS))

        return program.__wrapped__(call, name, Case(GROUPED, key_bias=True))(drawn)

    return jax.jit(everything)


@functools.cache
def forward_of(name: str) -> Callable[..., Any]:
    """Output and log-sum-exp of (q, k, v, codes, bias, form)."""

    def run(q: Any, k: Any, v: Any, codes: MaskCodes, bias: PairBias | None, form: str) -> Any:
        with interpreted():
            terms = () if bias is None else (term_of(bias, form),)
            return attention(q, k, v, codes, terms, scale=SCALE, implementation=name)

    return jax.jit(run, static_argnames="form")


def by_hand(drawn: Drawn, scale: float, inside: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Attention with log_gate over the keys in `inside` (all), in numpy and float64, one pair at a time in effect."""
    q, k, v = (np.asarray(x, np.float64) for x in drawn[:3])
    bias, G = drawn.bias, q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, G, axis=2) for x in (k, v))
    w, key = (np.repeat(np.asarray(x, np.float64), G, axis=2) for x in (bias.w, bias.key))
    z = np.einsum("BTHr,BSHr->BHTS", np.asarray(bias.u, np.float64), w)
    z += np.moveaxis(np.asarray(bias.row), 2, 1)[..., None] + np.moveaxis(key, 2, 1)[:, :, None]
    on = np.moveaxis(np.asarray(bias.query_on), 2, 1)[..., None] & np.asarray(bias.key_on)[:, None, None]
    scores = np.einsum("BTHh,BSHh->BHTS", q, k) * scale
    if drawn.key_bias is not None:
        scores += np.moveaxis(np.asarray(drawn.key_bias, np.float64), 2, 1)[:, :, None]
    scores += np.where(on, np.log(2) - np.logaddexp(0, -z), 0)
    lo, hi, order, open_q, open_k = (np.asarray(x) for x in drawn.codes)
    allow = (lo[..., None] <= order[:, None]) & (order[:, None] <= hi[..., None])
    # No interval reaches a key that is nowhere.
    allow &= (order != np.iinfo(np.int32).min)[:, None]
    allow |= open_q[..., None] == open_k[:, None]
    if inside is not None:
        allow &= inside[:, None]
    weights = np.where(allow[:, None], np.exp(scores), 0)
    total = weights.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.nan_to_num(np.einsum("BHTS,BSHc->BTHc", weights, v) / np.moveaxis(total, 1, 2)[..., None])
        return out, np.moveaxis(np.log(total), 1, 2)


def all_shapes(jaxpr: Any) -> Any:
    """Shapes of every intermediate array, inner computations included."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_shapes(inner)
