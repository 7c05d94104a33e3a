"""Masks, layer runs, hooks and their owners, rows of the map."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax import attention as at
from rave_jax.attention.attend import mask_codes, positions
from rave_jax.attention.checks import check_hooks
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.attention.base import tile_allow

DIMS = at.AttentionDims(4, 2, 8)
KEY = jax.random.key(0)


def info_of(document, kind=None) -> TokenInfo:
    document = jnp.asarray(document, jnp.int32)
    zeros = jnp.zeros_like(document)
    info = TokenInfo(*[zeros] * len(TokenInfo._fields))
    first = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    index = jnp.arange(document.shape[1], dtype=jnp.int32)
    return info._replace(
        offset=index - jax.lax.cummax(jnp.where(first, index, 0), axis=1),
        document=document,
        kind=jnp.where(document > 0, Kind.TEXT, Kind.PAD) if kind is None else jnp.asarray(kind),
    )


def features(q, k, v) -> at.Features:
    """Of positions that turn nothing, in a stream that nobody reads."""
    return at.Features(q, k, v, q, k, jnp.zeros((*q.shape[:2], 1)))


def allowed(codes) -> np.ndarray:
    return np.asarray(tile_allow(codes))[:, 0, 0]


rows = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(
    lambda lengths: np.pad(np.repeat(np.arange(1, len(lengths) + 1), lengths), (0, 20 - sum(lengths)))
)


@given(st.lists(rows, min_size=3, max_size=3), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_causal_and_window_rules_by_brute_force(batch, window):
    document = np.stack(batch)
    full, near = causal_and_near(jnp.asarray(document), window)
    i, j = np.ogrid[:20, :20]
    rule = (document[:, :, None] > 0) & (document[:, :, None] == document[:, None]) & (j <= i)
    np.testing.assert_array_equal(full, rule)
    np.testing.assert_array_equal(near, rule & (i - j < window))


@functools.partial(jax.jit, static_argnames="window")
def causal_and_near(document, window):
    info = info_of(document)
    codes = at.causal_codes(info)
    narrow = mask_codes([at.SlidingWindow(window).build(DIMS, KEY)], info, info, codes)
    return tile_allow(codes)[:, 0, 0], tile_allow(narrow)[:, 0, 0]


def test_block_diagonal_codes_see_their_own_frame_and_nothing_of_padding():
    document = np.array([[1, 1, 2, 2, 2, 0, 0]])
    seen = allowed(at.block_diagonal_codes(jnp.asarray(document)))[0]
    assert np.array_equal(seen, (document[0][:, None] == document[0]) & (document[0] > 0)[:, None])


def test_cached_codes_see_places_up_to_their_own_and_no_empty_entry():
    held = info_of([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0]])._replace(
        offset=jnp.array([[0, 1, 2, 3, 0, 0], [2, 0, 0, 1, 0, 0]])
    )
    query = info_of([[1], [1]])._replace(offset=jnp.array([[3], [1]]))
    seen = allowed(at.cached_codes(query, held))
    assert seen[0, 0].tolist() == [True] * 4 + [False] * 2
    assert seen[1, 0].tolist() == [False, False, True, True, False, False]
    assert not allowed(at.cached_codes(info_of([[0], [0]]), held)).any()


def test_text_positions_count_every_token():
    info = info_of([[1, 1, 2, 2]])._replace(offset=jnp.array([[0, 1, 0, 1]], jnp.int32))
    own = jnp.array([[0, 1, 2, 3]])
    given_ = positions([at.TextPositions().build(DIMS, KEY)], info, info, own, jnp.full((3, 1, 4), 7))
    assert given_.tolist() == [[[0, 1, 0, 1]]] * 3


def test_layers_are_planned_as_runs_of_equal_mechanisms():
    some, window = at.Rave(layers=(1, 2)), at.SlidingWindow(8)
    plan = at.plan_layer_runs((some, window), 5)
    assert [(p.start, p.stop, p.mechanisms) for p in plan] == [
        (0, 1, (window,)),
        (1, 3, (some, window)),
        (3, 5, (window,)),
    ]
    assert [(p.start, p.stop) for p in at.plan_layer_runs((), 5)] == [(0, 5)]
    with pytest.raises(ConfigError, match=r"Rave.layers names \[9\]"):
        at.plan_layer_runs((at.Rave(layers=(0, 9)),), 5)
    with pytest.raises(ConfigError, match=r"Rave.layers names \[1\] more than once, expected each layer once"):
        at.plan_layer_runs((at.Rave(layers=(1, 0, 1)),), 5)
    with pytest.raises(ConfigError, match=r"Gift.saliency_layer names \[14\], expected numbers from 0 to 4"):
        at.plan_layer_runs((at.Gift(layers=(1,)),), 5)
    with pytest.raises(ConfigError, match=r"Gift.saliency_layer names \[0\], layers without attention"):
        at.plan_layer_runs((at.Gift(layers=(1,), saliency_layer=0),), 5, attending=(1, 3))
    at.plan_layer_runs((at.Gift(alpha=0.0, layers=(1,)),), 5)


def test_two_owners_of_one_thing_are_refused_by_name():
    at.build_mechanisms((at.Rave(), at.Rave(rank=4)), DIMS, KEY)
    with pytest.raises(ConfigError, match="TextPositions cannot stand twice in a layer: each sets"):
        at.build_mechanisms((at.TextPositions(), at.TextPositions()), DIMS, KEY)


class Shutting(at.Mechanism):
    """Wants to be alone with key groups."""

    SHUTS = ("merge",)


class Merging(at.Mechanism):
    """Overrides the hook, and changes nothing."""

    def merge(self, x, parts, info_q, info_k):
        return None


def test_a_hook_that_another_shuts_is_refused_by_name():
    check_hooks([Shutting(), at.SlidingWindow().build(DIMS, KEY)])
    with pytest.raises(ConfigError, match="Shutting cannot share a layer with Merging, which overrides the hook 'mer"):
        check_hooks([Merging(), Shutting()])


@pytest.mark.parametrize("implementation", (pytest.param("reference", marks=pytest.mark.slow), "xla"))
def test_the_attention_of_queries_is_their_rows_of_the_map(implementation):
    rng = np.random.default_rng(0)
    T = 150
    kind = np.where(rng.random((2, T)) < 0.5, Kind.VISUAL, Kind.TEXT)
    info = info_of(np.ones((2, T)), kind)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, n, 8)), jnp.float32) for n in (4, 2, 2))
    gate = at.Rave(start="random").build(DIMS, KEY)
    wanted = jnp.array([[3, 149], [0, 77]])
    x = features(q, k, v)
    codes = at.causal_codes(info)

    @functools.partial(jax.jit, static_argnames="implementation")
    def attend(x, codes, info, implementation, queries=None):
        keys = at.remember([gate], x)
        return at.attend(x, keys, codes, info, info, [gate], implementation=implementation, queries=queries)

    given_ = attend(x, codes, info, implementation, wanted)
    # A value of e_j per key reads the map off the output.
    for b in range(2):
        eye = np.broadcast_to(np.eye(T, dtype=np.float32)[:, None, :], (1, T, 2, T))
        probe = features(q[b : b + 1], k[b : b + 1], eye)
        one, its_codes = jax.tree.map(lambda a, b=b: np.asarray(a)[b : b + 1], (info, codes))
        full = np.asarray(attend(probe, its_codes, one, "reference").out)
        np.testing.assert_allclose(given_.attention[b], full[0, wanted[b]], atol=1e-6)
