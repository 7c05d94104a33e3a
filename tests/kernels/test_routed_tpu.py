"""The TPU kernels of routed attention by both interpreters, against the mask form: outputs, log-sum-exps, gradients."""

from __future__ import annotations

import functools
import re
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu

from rave_jax.config import ConfigError
from rave_jax.kernels import routed
from rave_jax.kernels.attention import KeyGroups, MaskCodes, Term, Terms
from rave_jax.kernels.routed import RouteRule, Routes, Routing, of_regions, pallas_tpu
from rave_jax.kernels.routed.base import Choice
from rave_jax.kernels.routed.pallas_tpu import lists
from rave_jax.kernels.routed.pallas_tpu.forward import forward
from rave_jax.kernels.routed.pallas_tpu.heads import HeadWords
from rave_jax.kernels.routed.pallas_tpu.lists import Tiling
from rave_jax.kernels.routed.pallas_tpu.sizes import tiling_of
from rave_jax.kernels.routed.pallas_tpu.terms import PairItself
from rave_jax.kernels.support import interpreted
from tests.kernels.drawn import PairBias, term_of
from tests.kernels.routed_backend import (
    FORM,
    GROUP,
    BesideTheOracle,
    Drawn,
    Sizes,
    by_name,
    drawn_for,
    near,
    program,
    routes_of,
)
from tests.kernels.score_terms import terms_of

SIZES = Sizes(B=1, T=24, S=72, K=1, G=20, h=16, R=6, most_keys=20)
"""20 heads are 32 rows of a query, so that few queries fill a line: what an interpreter takes to compile grows with
the queries of an item."""
HEADS = RouteRule(2, share="head")
ITEMS = pallas_tpu.ItemSizes(queries=16, item=4, together=8, chunks=(4, 4))


def with_items(name: str, d: Sizes, drawn: Drawn, rule: RouteRule, interpret: Any = True) -> Any:
    """The kernels, with few queries in an item, and a gate where the operands have one."""
    return with_terms(Terms(() if drawn.bias is None else (term_of(drawn.bias, FORM),)), d, drawn, rule, interpret)


def with_terms(terms: Terms, d: Sizes, drawn: Drawn, rule: RouteRule, interpret: Any = True) -> Any:
    """The same with these score terms."""
    routes = drawn.routes
    if rule.with_bias:
        routes = routes._replace(bias=of_regions(terms.parts, routes.keys, d.R))
    with interpreted(interpret):
        return pallas_tpu.attention(*drawn[:4], terms, d.h**-0.5, routes, rule, d.most_keys, ITEMS)


class TestPallasTpu(BesideTheOracle):
    name = "pallas_tpu"
    sizes = SIZES
    rules = (GROUP, HEADS)
    call = staticmethod(with_items)
    slow = tuple(f"{test}[{HEADS}]" for test in ("test_it_is_the_stated_rule", "test_every_gradient_is_the_oracles"))

    @pytest.mark.slow
    @pytest.mark.parametrize("mesh", [(1, 2, 4)], ids=str)
    def test_a_mesh_changes_nothing(self, mesh: tuple[int, ...]) -> None:
        """One of two: what is cut how is decided before a backend is called."""
        super().test_a_mesh_changes_nothing(mesh)

    @pytest.mark.slow
    def test_the_interpreter_that_watches_memory_finds_the_same(self) -> None:
        given = self.drawn(0)
        call = functools.partial(with_items, interpret=pltpu.InterpretParams())
        found = program(call, self.name, SIZES, GROUP)(given)
        near(found, program(by_name, "reference", SIZES, GROUP)(given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "rule"),
    [
        ("log_gate", RouteRule(2, with_bias=True)),
        ("bent_score+log_gate+distance", GROUP),
        ("tanh+linear+centered_sigmoid", HEADS),
        ("soft_cap", GROUP),
    ],
)
def test_score_terms_are_the_oracles(names: str, rule: RouteRule) -> None:
    """Every gradient of every term: of pair products, of features of queries, keys and heads, and through the score
    itself; and of a bias by key and head. Each term is switched in its own way. `TestPallasTpu` has none at all."""
    seeds, rng = ((11, True), (12, False)), np.random.default_rng(0)

    def operands(seed: int, cut: bool) -> tuple[Drawn, dict[str, Any]]:
        given = drawn_for(SIZES, seed, cut=cut, biased=True)
        assert given.bias is not None
        gain, on = jnp.linspace(0.5, 1.5, SIZES.K * SIZES.G), rng.random(given.bias.query_on.shape) < 0.7
        floats = {"q": given.q, "k": given.k, "v": given.v, "bias": given.bias._replace(gain=gain, query_on=on)}
        if names == "soft_cap":
            floats["key_bias"] = jnp.asarray(rng.normal(size=(SIZES.B, SIZES.S, SIZES.K * SIZES.G)), jnp.float32)
        return given, floats

    def results(call: Any, given: Drawn, floats: Any) -> Any:
        switches = {name: getattr(floats["bias"], name) for name in ("query_on", "key_on")}

        def of(floats: Any) -> Any:
            mine = given._replace(q=floats["q"], k=floats["k"], v=floats["v"])
            bias = PairBias(**floats["bias"], **switches)
            return call(Terms(terms_of(bias, names), floats.get("key_bias")), mine)

        own = {name: x for name, x in floats["bias"]._asdict().items() if name not in switches}
        out, pull = jax.vjp(of, floats | {"bias": own})
        return out, pull((given.ct[0], jnp.where(jnp.isfinite(out[1]), given.ct[1], 0.0)))[0]

    def oracle(terms: Terms, mine: Drawn) -> Any:
        routes = mine.routes
        if rule.with_bias:
            routes = routes._replace(bias=of_regions(terms.parts, routes.keys, SIZES.R))
        how = {"routing": Routing(routes, rule), "scale": SIZES.h**-0.5, "implementation": "reference"}
        return routed.attention(*mine[:4], terms.parts, key_bias=terms.per_key, **how)

    found, expected = (
        jax.jit(functools.partial(results, call))
        for call in (lambda terms, mine: with_terms(terms, SIZES, mine, rule), oracle)
    )
    moved = {x for name in names.split("+") for x in MOVED.get(name, "").split()}
    for seed in seeds:
        given = operands(*seed)
        stated = expected(*given)
        near(found(*given), stated, atol=5e-5)
        assert {name for name, x in stated[1]["bias"].items() if bool((x != 0).any())} == moved
    if "distance" in names:
        # All keys are far from the mean key, at which the term adds too much: the kernel goes the other way.
        given, floats = operands(13, False)
        apart = jnp.where(jnp.arange(SIZES.S) % 2, 300.0, -300.0)[:, None]
        far = given, floats | {"bias": floats["bias"]._replace(key=floats["bias"].key + apart)}
        near(found(*far)[0], expected(*far)[0], atol=1e-3)


MOVED = {
    "log_gate": "u w row key",
    "tanh": "u w row key",
    "linear": "u w row key",
    "centered_sigmoid": "u w row key gain",
    "distance": "row key gain",
    "bent_score": "u w row",
}
"""What each term reads of the operands."""


def drawn(seed: int, **how: Any) -> Drawn:
    return drawn_for(SIZES, seed, **how, biased=False)


def run(given: Drawn, oracle: bool = False) -> Any:
    """(output, log-sum-exp, gradients by name)."""
    return program(by_name if oracle else with_items, "reference" if oracle else "pallas_tpu", SIZES, GROUP)(given)


def test_scores_far_from_a_regions_mean_go_the_other_way() -> None:
    """A key whose score is thousands above the mean of its region would overflow, and is found to."""
    given = drawn(4, part=1.0)
    given = given._replace(k=given.k.at[:, 10].multiply(3000.0))
    found, expected = run(given), run(given, oracle=True)
    assert float(jnp.abs(expected[1]).max()) > 1000
    near(found[:2], expected[:2], atol=2e-2)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((found[0], found[2])))


def test_a_row_with_too_large_a_region_is_no_number() -> None:
    given = drawn(5)
    keys = np.zeros((SIZES.B, SIZES.S), int)
    keys[:, : SIZES.most_keys + 1] = 1
    routes = routes_of(given.routes.query, given.routes.descriptor, keys, np.asarray(given.codes.hi))
    out, lse, _ = run(given._replace(routes=routes))
    assert bool(jnp.isnan(out).all()) and bool(jnp.isnan(lse).all())


def test_nothing_of_float32_as_large_as_the_output_waits_for_the_backward_pass() -> None:
    """Three parts keep their queries and outputs in the type these have; what merges them keeps nothing wider."""
    shape = jax.ShapeDtypeStruct
    q, kv = shape((1, 256, 8, 128), jnp.bfloat16), shape((1, 256, 1, 128), jnp.bfloat16)
    codes = MaskCodes(*(shape((1, 256), jnp.int32),) * 5)
    bounds, of_tokens = (shape((1, 2), jnp.int32),) * 2, (shape((1, 256), jnp.int32),) * 2
    wide = shape((1, 256, 8, 128), jnp.float32), shape((1, 2, 1, 128), jnp.float32)
    routes = Routes(*wide, *bounds, *of_tokens, shape((), jnp.float32))

    def kept(q: Any, k: Any, v: Any, codes: MaskCodes, routes: Routes) -> Any:
        with interpreted():
            return jax.vjp(lambda *x: pallas_tpu.attention(*x, codes, Terms(), 0.1, routes, GROUP, 128), q, k, v)[1]

    large = [x for x in jax.tree.leaves(jax.eval_shape(kept, q, kv, kv, codes, routes)) if x.size >= q.size]
    assert len(large) <= 9 and all(x.dtype == jnp.bfloat16 for x in large)


ONE = HeadWords.of(1, 8, 1)
work = jax.jit(lists.work, static_argnums=range(3, 9))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), sizes=st.sampled_from([(3, 128), (20, 256), (128, 128), (130, 128), (300, 256)]))
def test_every_pair_is_listed_once(seed: int, sizes: tuple[int, int]) -> None:
    """Each open (query, region) pair is in the lists of all tiles that hold the region's keys, once, and no other is;
    and every key of a region lies in one lane."""
    rng = np.random.default_rng(seed)
    most_keys, lanes = sizes
    tiling, queries, item, rows = Tiling(5, most_keys, lanes), 16, 8, 16
    pairs = (rng.random((1, 2, 32, 5)) < rng.choice([0.0, 0.3, 1.0])).astype(np.int32)
    whole, full = rng.random((1, 32, 5)) < 0.9, rng.random((1, tiling.tiles)) < 0.7
    made = work(pairs, whole, full, tiling, queries, item, 2 * item, rows, ONE)
    info, queued = np.asarray(made.info), np.asarray(made.lists)
    region, place = tiling.lane_map()
    of_tile = tiling.tile_regions()
    for k, block in np.ndindex(2, 2):
        words = info[0, k, block, 0]
        live = words[1 : 1 + words[0]]
        tiles, kinds, items = live & 0x3FFF, (live >> 14) & 3, live >> 16
        assert len(set(tiles)) == len(tiles)
        mine = pairs[0, k, block * queries : (block + 1) * queries]
        for tile in range(tiling.tiles):
            there = [(bit, r) for bit, r in enumerate(of_tile[tile]) if r >= 0]
            wanted = {n: sum(1 << bit for bit, r in there if mine[n, r]) for n in range(queries)}
            wanted = {n: bits for n, bits in wanted.items() if bits}
            if tile not in tiles:
                assert not wanted
                continue
            at = list(tiles).index(tile)
            listed = queued[0, k, block, tile][: items[at] * item]
            places = [int(x & 0xFFFF) for x in listed]
            assert sorted(x // rows for x in places if x < queries * rows) == sorted(wanted)
            if kinds[at] == lists.WHOLE:
                assert full[0, tile] and all(bits == sum(1 << bit for bit, _ in there) for bits in wanted.values())
            else:
                assert all(wanted.get(int(x & 0xFFFF) // rows, 0) == x >> 16 for x in listed)
    for r in range(5):
        assert sorted(place[region == r]) == list(range(most_keys))


@pytest.mark.parametrize(("heads", "most_keys"), [(7, 128), (8, 36), (20, 20)])
def test_every_head_sees_the_lanes_of_its_own_regions(heads: int, most_keys: int) -> None:
    """The bits of heads and regions, as rows of a query and as lanes, are what each head opened."""
    tiling, rows, rng = Tiling(19, most_keys), max(8, 1 << (heads - 1).bit_length()), np.random.default_rng(heads)
    words = HeadWords.of(heads, rows, tiling.sharing)
    pairs = rng.random((1, 1, heads, 3, 19)) < 0.4
    packed = words.pack(lists.open_heads(jnp.asarray(pairs)), tiling.tile_regions())
    assert packed.shape == (1, 1, 3, tiling.tiles, max(words.count, 1)) and words.inside == (most_keys == 128)
    region, _ = tiling.lane_map()
    bits = np.where(region < 0, 0, 1 << region % max(tiling.sharing, 1))

    def line_of(values: Any) -> Any:
        return jnp.concatenate([x[:, :rows] for x in values], axis=1)

    for tile in range(tiling.tiles):
        mine = [list(packed[0, 0, t, tile]) for t in range(3)]
        seen = np.stack([np.asarray(words.rows_of(x, 128)) & bits[tile] for x in mine]) != 0
        lanes = np.asarray(words.lanes_of(mine, line_of)).reshape(3, rows, 1)
        expected = pairs[0, 0][:, :, region[tile]] & (region[tile] >= 0)
        np.testing.assert_array_equal(np.moveaxis(seen[:, :heads], 0, 1), expected)
        np.testing.assert_array_equal((lanes & bits[tile]) != 0, seen)


def test_the_fill_is_what_lanes_hold() -> None:
    assert (Tiling(8, 128).fill, Tiling(8, 256, 256).fill, Tiling(8, 16).fill) == (1.0, 1.0, 1.0)
    ragged = Tiling(8, 144)
    assert (ragged.tiles, ragged.sharing, ragged.fill) == (9, 8, 1.0)
    assert Tiling(6, 36).fill == 6 * 36 / (2 * 128)
    sizes = pallas_tpu.ItemSizes(wide=0.6)
    small = tiling_of(448, 36, sizes)
    assert (small.lanes, small.sharing) == (256, 7)
    assert tiling_of(448, 36, pallas_tpu.ItemSizes(wide=0.8)).sharing == 3
    assert small.visits(0.25) == pytest.approx((1 - 0.75**7) * 256 / 7 / 36)
    assert Tiling(8, 128).visits(0.25) == 0.25 and abs(Tiling(2, 64).visits(0.25) - 0.4375) < 1e-9


def test_a_tile_or_query_that_is_not_there_is_an_error() -> None:
    """Numbers behind the last tile, and places behind the last query, are found by the interpreter."""
    given, tiling = drawn(7, cut=False), Tiling(SIZES.R, SIZES.most_keys)
    B, K = SIZES.B, SIZES.K
    call = pallas_tpu.make_call(given.q, given.k, tiling, ITEMS, 1.0, interpret=pltpu.InterpretParams())
    pairs, full = np.ones((B, K, call.T, SIZES.R), np.int32), np.ones((B, tiling.tiles), bool)
    made = work(pairs, pairs[:, 0] > 0, full, tiling, call.queries, call.item, call.length, 2 * call.rows, call.words)

    @jax.jit
    def compute(lists: Any, info: Any) -> Any:
        rows = jnp.zeros((B, K, call.T, call.rows, 128))
        kv = jnp.zeros((B, K, tiling.tiles, 128, 128))
        reference = jnp.zeros((B, K, call.T * call.rows // 128, 128))
        codes_q = jnp.zeros((B, call.blocks, 1, 3 * call.queries), jnp.int32)
        codes_k = jnp.zeros((B, tiling.tiles, 8, 128), jnp.int32)
        return forward(rows, reference, kv, kv, codes_q, codes_k, lists.reshape(-1), info, (), call, online=False)

    def with_info(change: Any) -> None:
        changed = change(made)
        jax.block_until_ready(compute(changed.lists, changed.info))

    with_info(lambda made: made)
    with pytest.raises(Exception, match=r"(?i)out.of.bounds|IndexError"):
        with_info(lambda made: made._replace(info=made.info.at[0, 0, 0, 0, 1].add(9)))
    with pytest.raises(Exception, match=r"(?i)out.of.bounds|IndexError"):
        with_info(lambda made: made._replace(lists=made.lists.at[0, 0, 0, 0, 3].add(4096)))


def test_items_are_whole_parts() -> None:
    """12 queries are no whole number of parts of 8: the last four would be left out."""
    for chunks in ((2, 4), (5, 4)):
        with pytest.raises(ConfigError, match="chunks"):
            pallas_tpu.ItemSizes(queries=12, item=12, chunks=chunks)


def test_what_it_cannot_do_is_said() -> None:
    given = drawn(8)
    q, k, v, codes, routes, *_ = given
    wide = jnp.zeros((*q.shape[:3], 129)), jnp.zeros((*k.shape[:3], 129))
    chosen: dict[str, Any] = {"scale": 0.1, "implementation": "pallas_tpu"}

    def attempt(rule: RouteRule = GROUP, most_keys: int | None = SIZES.most_keys, k: Any = k, **more: Any) -> Any:
        return jax.eval_shape(
            lambda: routed.attention(q, k, v, codes, routing=Routing(routes, rule, most_keys), **chosen, **more)
        )

    with pytest.raises(ValueError, match="its kernels run on TPUs, and the devices are cpu"):
        attempt()
    with interpreted():
        attempt()
        attempt(terms=[Term(PairItself(), *wide)])
        for message, changed in {
            "choices must be hard": {"rule": RouteRule(2, share="group", choice="soft_bias")},
            "the most keys of a region": {"most_keys": None},
            "key groups": {"key_groups": KeyGroups(jnp.zeros((SIZES.B, SIZES.S), jnp.int32), 1)},
            "one dtype": {"k": k.astype(jnp.bfloat16)},
            "do not fit into the chip's memory": {"most_keys": 10**6},
        }.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                attempt(**changed)


def test_choices_without_candidates_are_left_to_the_mask() -> None:
    """`open_pairs` lists what a routed query may see though it cannot choose it."""
    given = drawn(9, cut=False, part=1.0)
    routes = given.routes._replace(before=jnp.zeros_like(given.routes.before))
    choice = Choice(*(jnp.zeros((SIZES.B, 1, 1, SIZES.T, SIZES.R), bool),) * 2, None)
    openings = lists.region_openings(given.codes.open_k, routes.keys, SIZES.R)
    found = lists.open_pairs(choice, given.codes, routes, openings)[:, 0, 0]
    seen = (routes.first[:, None] <= given.codes.hi[..., None]) & (routes.first <= routes.last)[:, None]
    np.testing.assert_array_equal(found, seen)
    near(run(given._replace(routes=routes)), run(given._replace(routes=routes), oracle=True))
