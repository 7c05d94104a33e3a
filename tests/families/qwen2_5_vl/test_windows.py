from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.families.qwen2_5_vl.tower.windows import chunk_size, padded_size, window_attention, window_codes

WIDEST = 4


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Each patch over its own window, one at a time."""
    out = np.zeros_like(q)
    for b, i in np.ndindex(window.shape):
        mine = np.flatnonzero(window[b] == window[b, i]) if window[b, i] else []
        for head in range(q.shape[2] if len(mine) else 0):
            scores = k[b, mine, head] @ q[b, i, head] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, i, head] = weights @ v[b, mine, head] / weights.sum()
    return out


@jax.jit
def banded(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array) -> jax.Array:
    chunk = chunk_size(q.shape[1], WIDEST)
    return window_attention(q, k, v, window_codes(window, chunk), chunk, "reference")


@given(
    lengths=st.lists(st.lists(st.integers(1, WIDEST), max_size=6), min_size=2, max_size=2),
    P=st.sampled_from([12, 36]),
    seed=st.integers(0, 99),
)
def test_banded_attention_equals_attention_window_by_window(lengths: list[list[int]], P: int, seed: int) -> None:
    window = np.zeros((2, P), np.int32)
    for row, sizes in enumerate(lengths):
        numbers = np.repeat(np.arange(1, len(sizes) + 1), sizes)[:P]
        window[row, : len(numbers)] = numbers
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 2, P, 2, 4)).astype(np.float32)
    np.testing.assert_allclose(banded(q, k, v, window), dense(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("P", [1, 12, 13, 64, 65])
def test_a_chunk_and_its_neighbours_never_cost_more_than_all_patches(P: int) -> None:
    chunk = chunk_size(P, WIDEST)
    assert padded_size(P, WIDEST) % chunk == 0
    assert chunk == P if P <= 3 * WIDEST else chunk == WIDEST
