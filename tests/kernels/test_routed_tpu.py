"""The TPU kernels of routed attention by both interpreters, against the mask form: outputs, log-sum-exps, gradients."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu

from rave_jax.config import ConfigError
from rave_jax.kernels import routed
from rave_jax.kernels.attention import MaskCodes, PairForm
from rave_jax.kernels.attention import attention as plain
from rave_jax.kernels.attention.base import NOWHERE, Terms
from rave_jax.kernels.routed import RouteRule, Routes, Routing, pallas_tpu, xla
from rave_jax.kernels.routed.base import Choice
from rave_jax.kernels.routed.pallas_tpu import lists
from rave_jax.kernels.routed.pallas_tpu.forward import forward
from rave_jax.kernels.routed.pallas_tpu.lists import Tiling
from rave_jax.kernels.routed.pallas_tpu.sizes import tiling_of
from rave_jax.kernels.support import interpreted
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.kernels.drawn import codes_of

B, T, S, K, G, h, R, SLOTS = 1, 24, 72, 1, 20, 16, 6, 20
"""20 heads are 32 rows of a query, so that few queries fill a line: what an interpreter takes to compile grows with
the queries of an item."""
SIZES = pallas_tpu.ItemSizes(queries=16, item=4, chunks=(4, 4))
RULE = RouteRule(2, share="group")


class Drawn(NamedTuple):
    """Operands of a call, and cotangents."""

    q: Any
    k: Any
    v: Any
    codes: MaskCodes
    routes: Routes
    ct: Any


def drawn(seed: int, *, cut: bool = True, routed: float = 0.75) -> Drawn:
    """Queries are the last T of S tokens; regions of any size stand between keys of none. `cut` draws intervals that
    begin inside regions, and openings."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    keys, at = np.zeros((B, S), int), int(rng.integers(0, 4))
    for r in range(R):
        size = min(int(rng.integers(0, SLOTS + 1)), S - at)
        keys[:, at : at + size] = r + 1
        at = min(S, at + size + int(rng.integers(0, 3)))
    order = np.arange(S)
    hi = np.broadcast_to(np.arange(T) + S - T, (B, T))
    lo = np.where(rng.random((B, T)) < 0.2 * cut, rng.integers(0, S, (B, T)), 0)
    open_q = np.where(rng.random((B, T)) < 0.1 * cut, rng.integers(0, 3, (B, T)), -1)
    open_k = np.where(rng.random((B, S)) < 0.1 * cut, rng.integers(0, 3, (B, S)), -2)
    codes = codes_of(B, lo, hi, order, open_q, open_k)
    before = np.where(rng.random((B, T)) < routed, hi, NOWHERE)
    return Drawn(
        normal(B, T, K * G, h),
        normal(B, S, K, h),
        normal(B, S, K, h),
        codes,
        routes_of(normal(B, T, K * G, h), normal(B, R, K, h), keys, before),
        (normal(B, T, K * G, h), normal(B, T, K * G)),
    )


def routes_of(query: Any, descriptor: Any, keys: np.ndarray, before: np.ndarray, dense: float = 0.0) -> Routes:
    """Routes over keys whose order is their place."""
    first, last = np.full((B, R), 10**6), np.full((B, R), -1)
    for b, s in zip(*np.nonzero(keys), strict=True):
        n = keys[b, s] - 1
        first[b, n], last[b, n] = min(first[b, n], s), max(last[b, n], s)
    return Routes(
        query, descriptor, *(jnp.asarray(x, jnp.int32) for x in (first, last, before, keys)), jnp.float32(dense)
    )


@functools.partial(jax.jit, static_argnames=("oracle", "interpret"))
def run(given: Drawn, oracle: bool = False, interpret: Any = True) -> Any:
    """(output, log-sum-exp, gradients of q, k and v)."""
    q, k, v, codes, routes, ct = given

    def attend(q: Any, k: Any, v: Any) -> Any:
        if oracle:
            return xla.whole(q, k, v, codes, Terms(None, None), PairForm(), h**-0.5, routes, RULE)
        with interpreted(interpret):
            return pallas_tpu.attention(q, k, v, codes, h**-0.5, routes, RULE, SLOTS, SIZES)

    (out, lse), pull = jax.vjp(attend, q, k, v)
    return out, lse, pull((ct[0], jnp.where(jnp.isfinite(lse), ct[1], 0.0)))


def near(found: Any, expected: Any, atol: float = 2e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), found, expected)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cut=st.booleans(),
    part=st.sampled_from([0.0, 0.75, 1.0]),
    dense=st.sampled_from([0.0, 0.4]),
)
def test_gathering_equals_the_mask_form(seed: int, cut: bool, part: float, dense: float) -> None:
    given = drawn(seed, cut=cut, routed=part)
    given = given._replace(routes=given.routes._replace(dense=jnp.float32(dense)))
    near(run(given), run(given, oracle=True))


@pytest.mark.slow
def test_it_does_by_the_interpreter_that_watches_memory() -> None:
    given = drawn(0)
    near(run(given, interpret=pltpu.InterpretParams()), run(given, oracle=True))


def test_all_regions_are_plain_attention() -> None:
    given = drawn(1)
    given = given._replace(routes=given.routes._replace(dense=jnp.float32(1.0)))

    def attend(q: Any, k: Any, v: Any) -> Any:
        return plain(q, k, v, given.codes, scale=h**-0.5, implementation="reference")

    (out, lse), pull = jax.vjp(attend, given.q, given.k, given.v)
    near(run(given), (out, lse, pull((given.ct[0], jnp.where(jnp.isfinite(lse), given.ct[1], 0.0)))))


def test_without_a_picture_it_is_plain_attention() -> None:
    given = drawn(2)
    keys = np.zeros((B, S), int)
    routes = routes_of(given.routes.query, given.routes.descriptor, keys, np.asarray(given.codes.hi))
    given = given._replace(routes=routes)
    out, lse, _ = run(given)
    near((out, lse), plain(*given[:4], scale=h**-0.5, implementation="reference"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2, 2), (1, 1, 4)], ids=["rows and kv heads", "more devices than kv heads"])
def test_a_mesh_changes_nothing(mesh: tuple[int, int, int]) -> None:
    """Two rows and two kv heads, each of draws of its own."""
    rows = [[drawn(10 * row + head) for head in range(2)] for row in range(2)]
    heads = {"q", "k", "v", "query", "descriptor", "ct"}

    def both(name: str, pick: Any) -> Any:
        parts = [jnp.concatenate([pick(x) for x in row], axis=2) if name in heads else pick(row[0]) for row in rows]
        return jnp.concatenate(parts, axis=0)

    q, k, v = (both(name, lambda x, name=name: getattr(x, name)) for name in ("q", "k", "v"))
    codes = MaskCodes(*(both("", lambda x, n=n: x.codes[n]) for n in range(5)))
    of_routes = {n: both(n, lambda x, n=n: getattr(x.routes, n)) for n in Routes._fields if n not in ("dense", "bias")}
    routes = Routes(**of_routes, dense=jnp.float32(0.0))
    ct = tuple(both("ct", lambda x, n=n: x.ct[n]) for n in range(2))

    def gradients(q: Any, k: Any, v: Any) -> Any:
        return run.__wrapped__(Drawn(q, k, v, codes, routes, ct))

    alone = jax.jit(gradients)(q, k, v)
    with use_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: math.prod(mesh)])):
        split = jax.jit(lambda *x: gradients(*x))(q, k, v)
    near(split, alone)


def test_what_is_not_chosen_touches_nothing() -> None:
    """Values of shut regions may be anything, and their keys get no gradient."""
    given = drawn(3, cut=False, routed=1.0)
    # All queries rank regions alike.
    routes, codes = given.routes._replace(query=jnp.ones_like(given.routes.query)), given.codes
    choice = xla.choice_of(None, codes, routes, RULE, PairForm(), 1.0)
    open_ = (
        np.asarray(routed.open_keys(choice, routes.keys)[:, 0, 0]) & (codes.order[:, None] <= codes.hi[..., None])
    ).any(1)
    assert not open_.all()
    given = given._replace(routes=routes)
    out, lse, (_, d_k, d_v) = run(given)
    loud = given._replace(v=jnp.where(open_[:, :, None, None], given.v, 1e30))
    near(run(loud)[:2], (out, lse), atol=0)
    assert not d_k[~open_].any() and not d_v[~open_].any()


def test_scores_far_from_a_regions_mean_go_the_other_way() -> None:
    """A key whose score is thousands above the mean of its region would overflow, and is found to."""
    given = drawn(4, routed=1.0)
    given = given._replace(k=given.k.at[:, 10].multiply(3000.0))
    found, expected = run(given), run(given, oracle=True)
    assert float(jnp.abs(expected[1]).max()) > 1000
    near(found[:2], expected[:2], atol=2e-2)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((found[0], found[2])))


def test_a_row_with_too_large_a_region_is_no_number() -> None:
    given = drawn(5)
    keys = np.zeros((B, S), int)
    keys[:, : SLOTS + 1] = 1
    routes = routes_of(given.routes.query, given.routes.descriptor, keys, np.asarray(given.codes.hi))
    out, lse, _ = run(given._replace(routes=routes))
    assert bool(jnp.isnan(out).all()) and bool(jnp.isnan(lse).all())


def test_a_packed_row_is_its_documents() -> None:
    """Two documents in a row, each with its regions, against each alone."""
    given = drawn(6, cut=False)
    cut, (q, k, v, codes, routes, ct) = S - T // 2, given
    keys = np.asarray(routes.keys) * (np.arange(S) < S - T)
    row = np.arange(T) + S - T
    lo = np.where(row < cut, 0, cut - 8)
    both = codes._replace(lo=jnp.asarray(lo, jnp.int32)[None])
    keys[:, cut - 8 : cut - 2] = R
    packed = Drawn(q, k, v, both, routes_of(routes.query, routes.descriptor, keys, np.asarray(codes.hi)), ct)
    out, lse, _ = run(packed)
    # The second document alone: all keys of the first are of no region and out of reach.
    apart = np.where(np.arange(S) >= cut - 8, keys, 0)
    order = jnp.where(jnp.arange(S) >= cut - 8, both.order, NOWHERE)
    alone = packed._replace(
        codes=both._replace(order=order),
        routes=routes_of(routes.query, routes.descriptor, apart, np.asarray(codes.hi)),
    )
    found = run(alone)
    later = row >= cut
    near((out[:, later], lse[:, later]), (found[0][:, later], found[1][:, later]))


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
            return jax.vjp(lambda *x: pallas_tpu.attention(*x, codes, 0.1, routes, RULE, 128), q, k, v)[1]

    large = [x for x in jax.tree.leaves(jax.eval_shape(kept, q, kv, kv, codes, routes)) if x.size >= q.size]
    assert len(large) <= 9 and all(x.dtype == jnp.bfloat16 for x in large)


work = jax.jit(lists.work, static_argnums=range(3, 7))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), sizes=st.sampled_from([(3, 128), (20, 256), (128, 128), (130, 128), (300, 256)]))
def test_every_pair_is_listed_once(seed: int, sizes: tuple[int, int]) -> None:
    """Each open (query, region) pair is in the lists of all tiles that hold the region's keys, once, and no other is;
    and every key of a region lies in one lane."""
    rng = np.random.default_rng(seed)
    slots, lanes = sizes
    tiling, queries, item, rows = Tiling(5, slots, lanes), 16, 8, 16
    pairs = rng.random((1, 2, 32, 5)) < rng.choice([0.0, 0.3, 1.0])
    whole, full = rng.random((1, 32, 5)) < 0.9, rng.random((1, tiling.tiles)) < 0.7
    made = work(pairs, whole, full, tiling, queries, item, rows)
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
        assert sorted(place[region == r]) == list(range(slots))


def test_the_fill_is_what_lanes_hold() -> None:
    assert (Tiling(8, 128).fill, Tiling(8, 256, 256).fill, Tiling(8, 16).fill) == (1.0, 1.0, 1.0)
    ragged = Tiling(8, 144)
    assert (ragged.tiles, ragged.sharing, ragged.fill) == (9, 8, 1.0)
    assert Tiling(6, 36).fill == 6 * 36 / (2 * 128)
    small = tiling_of(448, 36)
    assert (small.lanes, small.sharing) == (256, 7)
    assert small.visits(0.25) == pytest.approx((1 - 0.75**7) * 256 / 7 / 36)
    assert Tiling(8, 128).visits(0.25) == 0.25 and abs(Tiling(2, 64).visits(0.25) - 0.4375) < 1e-9


def test_a_tile_or_query_that_is_not_there_is_an_error() -> None:
    """Numbers behind the last tile, and places behind the last query, are found by the interpreter."""
    given, tiling = drawn(7, cut=False), Tiling(R, SLOTS)
    call = pallas_tpu.make_call(given.q, given.k, tiling, SIZES, 1.0, interpret=pltpu.InterpretParams())
    pairs = np.ones((B, K, call.T, R), bool)
    made = work(pairs, pairs[:, 0], np.ones((B, tiling.tiles), bool), tiling, call.queries, call.item, 2 * call.rows)

    @jax.jit
    def compute(lists: Any, info: Any) -> Any:
        rows = jnp.zeros((B, K, call.T, call.rows, 128))
        kv = jnp.zeros((B, K, tiling.tiles, 128, 128))
        reference = jnp.zeros((B, K, call.T * call.rows // 128, 128))
        codes_q = jnp.zeros((B, call.blocks, 1, 3 * call.queries), jnp.int32)
        codes_k = jnp.zeros((B, tiling.tiles, 8, 128), jnp.int32)
        return forward(rows, reference, kv, kv, codes_q, codes_k, lists.reshape(-1), info, call, online=False)

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
    q, k, v, codes, routes, _ = given
    chosen: dict[str, Any] = {"scale": 0.1, "implementation": "pallas_tpu"}

    def attempt(rule: RouteRule = RULE, slots: int | None = SLOTS, k: Any = k, **more: Any) -> Any:
        return jax.eval_shape(
            lambda: routed.attention(q, k, v, codes, routing=Routing(routes, rule, slots), **chosen, **more)
        )

    with pytest.raises(ValueError, match="its kernels run on TPUs, and the devices are cpu"):
        attempt()
    with interpreted():
        attempt()
        for message, changed in {
            "a choice for each query head": {"rule": RouteRule(2)},
            "choices must be hard": {"rule": RouteRule(2, share="group", choice="soft_bias")},
            "the most keys of a region": {"slots": None},
            "a pair bias, a key bias and key groups": {"key_bias": jnp.zeros((B, S, K * G))},
            "one dtype": {"k": k.astype(jnp.bfloat16)},
            "do not fit into the chip's memory": {"slots": 10**6},
        }.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                attempt(**changed)


def test_choices_without_candidates_are_left_to_the_mask() -> None:
    """`open_pairs` lists what a routed query may see though it cannot choose it."""
    given = drawn(9, cut=False, routed=1.0)
    routes = given.routes._replace(before=jnp.zeros_like(given.routes.before))
    choice = Choice(*(jnp.zeros((B, 1, 1, T, R), bool),) * 2, None)
    openings = lists.region_openings(given.codes.open_k, routes.keys, R)
    found = lists.open_pairs(choice, given.codes, routes, openings)[:, 0]
    seen = (routes.first[:, None] <= given.codes.hi[..., None]) & (routes.first <= routes.last)[:, None]
    np.testing.assert_array_equal(found, seen)
    near(run(given._replace(routes=routes)), run(given._replace(routes=routes), oracle=True))
