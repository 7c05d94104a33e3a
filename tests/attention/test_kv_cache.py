"""The cache: runs land in their entries and nowhere else, views go back where they came from, int8 loses little."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax import attention as at
from rave_jax.attention import kv_cache as kv
from rave_jax.batch import TokenInfo

L, B, S, K, h, r = 2, 3, 8, 2, 4, 3
write, read = jax.jit(kv.write), jax.jit(kv.read, static_argnums=2)
take, put = jax.jit(kv.KvCache.take, static_argnums=2), jax.jit(kv.KvCache.put)


class Remembered(NamedTuple):
    """What a mechanism may remember of keys: a vector and a number."""

    w: Any
    key: Any


def shapes() -> tuple[at.Keys, ...]:
    def of(*rest: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((L, B, S, K, *rest), jnp.float32)

    return (at.Keys(of(h), of(h), (Remembered(of(r), of()), None)),)


def keys(T: int, seed: int = 0) -> at.Keys:
    rng = np.random.default_rng(seed)
    k, v, w, key = (jnp.asarray(rng.normal(size=(B, T, K, *rest)), jnp.float32) for rest in ((h,), (h,), (r,), ()))
    return at.Keys(k, v, (Remembered(w, key), None))


@functools.cache
def filled(kind: at.CacheType = "compute") -> kv.KvCache:
    cache = kv.empty_cache(shapes(), kind)
    (stored,) = cache.layer_runs
    for layer in range(L):
        stored = write(stored, jnp.int32(layer), jnp.zeros(B, jnp.int32), keys(S, seed=layer))
    info = TokenInfo(*(jnp.asarray(np.random.default_rng(9).integers(0, 9, (B, S)), jnp.int32) for _ in cache.info))
    return kv.KvCache((stored,), info, jnp.array([3, 5, 8], jnp.int32))


@given(st.integers(1, S), st.lists(st.integers(0, S + 2), min_size=B, max_size=B), st.integers(0, L - 1))
def test_a_run_is_written_to_its_entries_of_its_layer_or_not_at_all(T: int, starts: list[int], layer: int) -> None:
    before, new = filled().layer_runs[0], keys(T, seed=7)
    after = write(before, jnp.int32(layer), jnp.array(starts, jnp.int32), new)
    for n in range(L):
        was, now = (read(stored, jnp.int32(n), jnp.dtype(jnp.float32)) for stored in (before, after))
        expected = jax.tree.map(np.array, was)
        for row, start in enumerate(starts):
            if n == layer and start + T <= S:
                for old, run in zip(jax.tree.leaves(expected), jax.tree.leaves(new), strict=True):
                    old[row, start : start + T] = run[row]
        jax.tree.map(np.testing.assert_array_equal, now, expected)


@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 2, 1]])
@pytest.mark.parametrize("reach", [3, S])
def test_what_is_taken_goes_back_where_it_was(rows: list[int], reach: int) -> None:
    cache = filled()
    part = take(cache, jnp.array([*rows, B], jnp.int32), reach)
    assert part.size == reach and part.layer_runs[0].k.shape == (L, len(rows) + 1, K, reach, h)
    np.testing.assert_array_equal(part.info.kind[: len(rows)], cache.info.kind[np.array(rows), :reach])
    same = put(cache, part, jnp.array([*rows, B], jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, same, cache)
    marked = put(cache, jax.tree.map(lambda x: x * 0 - 1, part), jnp.array([*rows, B], jnp.int32))
    others = [row for row in range(B) if row not in rows]
    np.testing.assert_array_equal(marked.index, [-1 if row in rows else cache.index[row] for row in range(B)])
    now, was = marked.layer_runs[0].remembered[0].w, cache.layer_runs[0].remembered[0].w
    assert np.all(np.asarray(now)[:, rows, :, :reach] == -1)
    np.testing.assert_array_equal(now[:, :, :, reach:], was[:, :, :, reach:])
    np.testing.assert_array_equal(now[:, np.array(others, int)], was[:, np.array(others, int)])
    whole = put(cache, jax.tree.map(lambda x: x * 0 - 1, take(cache, None, reach)), None)
    assert np.all(np.asarray(whole.info.turn)[:, :reach] == -1)
    np.testing.assert_array_equal(whole.info.turn[:, reach:], cache.info.turn[:, reach:])


@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_int8_is_off_by_half_a_step_at_most(seed: int, size: float) -> None:
    x = np.random.default_rng(seed).normal(size=(5, 3, 16)).astype(np.float32) * np.float32(size)
    x[0, 0] = 0
    found = kv.quantise(jnp.asarray(x))
    assert found.values.dtype == jnp.int8 and found.scale.shape == (5, 3)
    back = np.asarray(found.values, np.float32) * np.asarray(found.scale)[..., None]
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert np.all(np.abs(back - x) <= 0.5001 * step) and np.all(back[0, 0] == 0)


@pytest.mark.parametrize(("kind", "bytes_per_number"), [("compute", 4), ("bfloat16", 2), ("int8", 1 + 4 / h)])
def test_number_types_hold_what_they_say(kind: at.CacheType, bytes_per_number: float) -> None:
    cache = filled(kind)
    (stored,) = cache.layer_runs
    gate = sum(x.nbytes for x in jax.tree.leaves(stored.remembered))
    assert gate == L * B * S * K * (r + 1) * 4, "what a mechanism remembers keeps its own type"
    codes = sum(x.nbytes for x in (*cache.info, cache.index))
    assert cache.nbytes == 2 * L * B * S * K * h * bytes_per_number + gate + codes
    found = kv.read(stored, jnp.int32(1), jnp.dtype(jnp.float32))
    tolerance = {"compute": 0, "bfloat16": 2**-8, "int8": 1 / 127}[kind]
    exact = keys(S, seed=1)
    assert found.k.dtype == jnp.float32
    np.testing.assert_allclose(found.k, exact.k, atol=tolerance * float(jnp.abs(exact.k).max()))
    np.testing.assert_array_equal(found.remembered[0].w, exact.remembered[0].w)
