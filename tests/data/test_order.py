"""The order of samples: pure, complete within an epoch, and true to the curriculum's weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.data.order import BLOCK, Order, shares, shuffled


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 5), st.data())
def test_each_source_is_walked_through_once_per_epoch(lengths: list[int], seed: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    order = Order(lengths, [(0, weights)], seed)
    draws = [order.source_of(draw) for draw in range(300)]
    for source, length in enumerate(lengths):
        numbers = [number for s, number in draws if s == source]
        assert numbers == list(range(len(numbers)))
        indices = [order.index(source, number) for number in range(3 * length)]
        for epoch in range(3):
            assert sorted(indices[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_stages_change_the_shares_and_go_on_counting() -> None:
    order = Order([50, 70], [(0, (1, 0)), (1500, (1, 3)), (4000, (0, 1))], seed=3)
    draws = [order.source_of(draw) for draw in range(6000)]
    sources = np.array([source for source, _ in draws])
    assert sources[:1500].sum() == 0
    middle = sources[1500:4000]
    assert abs(middle.mean() - 0.75) < 0.02
    assert sources[4000:].all()
    for source in (0, 1):
        numbers = [number for s, number in draws if s == source]
        assert numbers == list(range(len(numbers)))


def test_the_order_is_pure() -> None:
    stages = [(0, (2, 1)), (700, (1, 1))]
    first, second = Order([9, 5], stages, 7), Order([9, 5], stages, 7)
    forward = [first.source_of(draw) for draw in range(1400)]
    backward = [second.source_of(draw) for draw in reversed(range(1400))][::-1]
    assert forward == backward
    other = Order([9, 5], stages, 8)
    assert [other.source_of(draw) for draw in range(1400)] != forward


def test_the_shuffle_is_fixed_for_good() -> None:
    """Runs must be repeatable across machines and releases of numpy, so the very order is pinned."""
    assert shuffled(8, 0, 2, 0, 0).tolist() == [4, 3, 7, 6, 5, 2, 0, 1]
    assert len(set(map(tuple, (shuffled(8, 0, 2, 0, epoch).tolist() for epoch in range(20))))) > 15


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_shares_add_up(weights: list[float]) -> None:
    counts = shares(weights)
    assert counts.sum() == BLOCK
    assert np.abs(counts - np.array(weights) / sum(weights) * BLOCK).max() <= 1


def test_a_weight_too_small_to_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1/1024"):
        shares((1.0, 1e-6))
    assert Counter(shares((1.0, 0.0)).tolist()) == {BLOCK: 1, 0: 1}
