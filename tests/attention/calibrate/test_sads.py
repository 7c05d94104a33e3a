"""SADS: heaps and the valley between them, the heads that stay, where late layers begin, and what heads attend to."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import Sads
from rave_jax.attention.calibrate.mixture import fitted, valley
from rave_jax.attention.calibrate.sads import (
    HeadStats,
    SadsSearch,
    hoyer,
    late_from,
    peak_and_entropy,
    sparsify,
)
from rave_jax.config import ConfigError

L, H, K = 6, 8, 4
GIVEN = SadsSearch(start=3)


def heaps(low: float, high: float, share: float, spread: float = 0.02, count: int = 400) -> np.ndarray:
    rng = np.random.default_rng(0)
    some = int(share * count)
    return np.concatenate([rng.normal(low, spread, some), rng.normal(high, spread, count - some)])


def test_the_fit_finds_the_mixture_that_numbers_were_drawn_from() -> None:
    rng = np.random.default_rng(1)
    found = fitted(np.concatenate([rng.normal(-1, 0.5, 3000), rng.normal(2, 0.25, 1000)]))
    np.testing.assert_allclose(found.weight, [0.75, 0.25], atol=0.01)
    np.testing.assert_allclose(found.mean, [-1, 2], atol=0.03)
    np.testing.assert_allclose(np.sqrt(found.variance), [0.5, 0.25], atol=0.02)
    # Ashman's D of the true mixture is sqrt(2) * 3 / sqrt(0.3125).
    assert abs(found.separation - np.sqrt(2) * 3 / np.sqrt(0.3125)) < 0.3


def test_the_valley_is_where_the_density_is_lowest_between_the_means() -> None:
    values = heaps(0.1, 0.6, 0.7)
    found, mixture = valley(values), fitted(values)
    assert found is not None and 0.2 < found < 0.5
    between = np.linspace(*mixture.mean, 99)
    assert mixture.density(np.array([found]))[0] <= mixture.density(between).min() + 1e-9


@pytest.mark.parametrize(
    "values",
    [heaps(0.3, 0.3, 0.5), heaps(0.3, 0.33, 0.5), np.full(9, 0.2), np.array([0.1, 0.9, 0.9]), np.zeros(0)],
    ids=["one heap", "two that run into each other", "equal", "too few", "none"],
)
def test_numbers_of_one_heap_have_no_valley(values: np.ndarray) -> None:
    assert valley(values) is None


def stats() -> HeadStats:
    """Late layers (3 to 5) have vision heads 2 to 5, sinks 1 and 6 that spread, and sinks 0 and 7 that collapsed."""
    rng = np.random.default_rng(2)
    peak = rng.normal(0.5, 0.02, (L, H))
    peak[:, [0, 1, 6, 7]] = rng.normal(0.05, 0.02, (L, 4))
    entropy = rng.normal(0.8, 0.02, (L, H))
    entropy[:, [0, 7]] = rng.normal(0.2, 0.02, (L, 2))
    sparsity, variance = np.full(L, 0.3), np.full(L, 1.0)
    sparsity[4:], variance[4:] = 0.7, 2.5
    return HeadStats(peak, entropy, sparsity, variance)


def test_sinks_that_collapsed_are_dropped_but_for_head_0() -> None:
    found = sparsify(GIVEN, stats(), K)
    assert found.alpha is not None and 0.1 < found.alpha < 0.45
    assert found.beta is not None and 0.25 < found.beta < 0.75
    dropped = np.zeros((L, H), bool)
    dropped[3:, 7] = True
    np.testing.assert_array_equal(found.dropped, dropped)
    assert found.vision[3:].sum() == 12 and found.spread[3:].sum() == 6 and not found.vision[:3].any()
    assert found.configs == (Sads(heads=(7,), layers=(3, 4, 5)),)


def test_of_the_heads_of_a_kv_head_the_most_spread_stays() -> None:
    given = stats()
    given.entropy[:, 6], given.peak[:, 6] = 0.25, 0.05  # 6 and 7 share a kv head, and both collapsed
    given.entropy[:, 7] = 0.15
    dropped = sparsify(GIVEN, given, K).dropped
    assert np.flatnonzero(dropped[4]).tolist() == [7]
    assert np.flatnonzero(sparsify(GIVEN, given, 1).dropped[4]).tolist() == [6, 7]


def test_one_heap_drops_nothing() -> None:
    plain = stats()
    even = plain._replace(peak=np.random.default_rng(3).normal(0.3, 0.02, (L, H)))
    found = sparsify(GIVEN, even, K)
    assert found.alpha is None and found.configs == () and found.vision[3:].all()
    spread = plain._replace(entropy=np.random.default_rng(3).normal(0.8, 0.02, (L, H)))
    found = sparsify(GIVEN, spread, K)
    assert found.alpha is not None and found.beta is None and not found.dropped.any()


def test_the_earlier_version_keeps_a_quarter_of_the_sinks() -> None:
    found = sparsify(SadsSearch(start=3, keep="quarter"), stats(), 1)
    sinks = ~found.vision[3:]
    assert sinks.sum() == 12 and found.spread[3:].sum() == 3
    kept = stats().entropy[3:][found.spread[3:]]
    assert kept.min() >= np.sort(stats().entropy[3:][sinks])[-3]


def test_late_layers_begin_where_keys_jump_and_gradients_are_sparse_to_the_end() -> None:
    plain = HeadStats(stats().peak, stats().entropy, np.arange(9) / 10, np.array([1, 5, 1, 1, 1, 1, 1, 3, 3]) * 1.0)
    assert late_from(plain, 2.0) == 7, "not at layer 1, where the jump does not last"
    assert late_from(plain, 4.0) is None
    sparse_last = plain._replace(sparsity=np.array([0.5] * 8 + [0.9]))
    assert late_from(sparse_last, 2.0) == 8
    assert sparsify(SadsSearch(), stats(), K).start == 4
    with pytest.raises(ConfigError, match="no layer is shown as the first late one by its gradients"):
        sparsify(SadsSearch(jump=3.0), stats(), K)
    with pytest.raises(ConfigError, match=r"start is 6, expected a number from 0 to 5, or -1"):
        sparsify(SadsSearch(start=6), stats(), K)
    with pytest.raises(ConfigError, match="not finite"):
        sparsify(GIVEN, stats()._replace(variance=np.full(L, np.nan)), K)


def test_hoyers_sparsity_is_0_of_equal_and_1_of_a_single_number() -> None:
    np.testing.assert_allclose(hoyer(np.array([[2.0, -2, 2, 2], [0, 3, 0, 0], [0, 0, 0, 0]])), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(hoyer(np.array([3.0, 4.0])), (np.sqrt(2) - 7 / 5) / (np.sqrt(2) - 1))
    np.testing.assert_array_equal(hoyer(np.ones((2, 1))), [0, 0])


def test_peak_and_entropy_are_the_stated_sums() -> None:
    rng = np.random.default_rng(4)
    attention = rng.dirichlet(np.ones(7), (2, 3, 4)).astype(np.float32)  # [B,N,H,S]
    rows = np.array([[True, True, False], [False, True, True]])
    visual = np.array([[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]], bool)
    other = np.array([[1, 0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1, 1]], bool)
    peak, entropy = peak_and_entropy(*map(jnp.asarray, (attention, rows, visual, other)))
    for b, h in np.ndindex(2, 4):
        maps = attention[b, rows[b], h]
        np.testing.assert_allclose(peak[b, h], maps[:, visual[b]].mean(0).max(), rtol=1e-5)
        p = (maps[:, other[b]] / maps[:, other[b]].sum(1, keepdims=True)).mean(0)
        np.testing.assert_allclose(entropy[b, h], -(p * np.log(p)).sum() / np.log(other[b].sum()), rtol=1e-5)


def test_bad_searches_name_the_field() -> None:
    for bad in ({"start": -2}, {"jump": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SadsSearch(**bad)
