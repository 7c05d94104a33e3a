"""The order of samples: pure, complete within an epoch, and true to the weights."""

from __future__ import annotations

import pickle
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.data.config import Stage
from rave_jax.data.order import FEW, MOST_SAMPLES, Order, _seed, turns, whole_shares
from rave_jax.data.order import given as given_samples

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def by_source(order: Order, draws: int) -> list[list[int]]:
    """The indices that the first draws take of each source."""
    sources, indices = order.draws(0, draws)
    return [indices[sources == number].tolist() for number in range(len(order.lengths))]


@given(LENGTHS, st.integers(0, 2**40), st.data())
def test_each_source_gives_each_sample_once_per_epoch(lengths: list[int], seed: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    for length, indices in zip(lengths, by_source(Order(tuple(lengths), seed).then(0, weights), 80), strict=True):
        for begin in range(0, len(indices), length):
            epoch = indices[begin : begin + length]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(length))


@pytest.mark.parametrize("length", [FEW - 1, FEW, FEW + 1])
def test_few_and_many_samples_come_once_per_epoch(length: int) -> None:
    """They are shuffled in two ways."""
    _, indices = Order((length,), 1).then(0, (1,)).draws(0, 2 * length)
    assert sorted(indices[:length]) == sorted(indices[length:]) == list(range(length))
    assert (indices[:length] != indices[length:]).mean() > 0.9


@pytest.mark.parametrize("length", [FEW, 70_000])
def test_many_samples_stand_as_grain_shuffles_them(length: int) -> None:
    import grain

    _, indices = Order((length,), 4).then(0, (1,)).draws(length - 30, length + 30)
    shuffled = grain.MapDataset.range(length).shuffle(_seed(4, 0)).repeat()
    assert indices.tolist() == [shuffled[draw] for draw in range(length - 30, length + 30)]


def test_turns_are_exact_for_any_shares() -> None:
    """Also where products do not fit 64 bits."""
    for shares in ((3, 0, 2), (10**17 + 3, 7, 10**17 - 1)):
        sources, before = turns(10**9, 10**9 + 200, shares)
        for place, (source, count) in enumerate(zip(sources.tolist(), before.tolist(), strict=True)):
            counts, after = given_samples(10**9 + place, shares), given_samples(10**9 + place + 1, shares)
            assert count == counts[source] and after[source] == count + 1 and sum(after) == sum(counts) + 1


def test_each_epoch_and_each_source_has_an_order_of_its_own() -> None:
    first, second = by_source(Order((30, 30), seed=5).then(0, (1, 1)), 600)
    orders = {tuple(indices[begin : begin + 30]) for indices in (first, second) for begin in range(0, 300, 30)}
    assert len(orders) == 20


@given(st.data())
def test_stages_go_on_where_the_sources_stopped(data: st.DataObject) -> None:
    """What a source gives does not depend on the weights, which say only how soon."""
    firsts = sorted(data.draw(st.lists(st.integers(0, 60), min_size=3, max_size=3)))
    order = alone = Order((7, 11), seed=3)
    for first in (0, *firsts):
        weights = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(any))
        order = order.then(first, weights)
    for number, indices in enumerate(by_source(order, 90)):
        weight = [0, 0]
        weight[number] = 1
        assert indices == alone.then(0, weight).draws(0, len(indices))[1].tolist()
        assert len(indices) == order.taken(90)[number]


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=6).filter(any), st.integers(0, 10**12))
def test_weights_are_kept_at_any_draw(weights: list[float], draw: int) -> None:
    order = Order((5,) * len(weights), 0).then(0, weights)
    taken = order.taken(draw)
    assert sum(taken) == draw
    for weight, count in zip(weights, taken, strict=True):
        share = Fraction(repr(weight)) / sum(Fraction(repr(other)) for other in weights) * draw
        assert abs(count - share) <= len(weights)
        assert weight > 0 or count == 0


def test_weights_mix_as_they_are_written() -> None:
    assert whole_shares((0.1, 0.3)) == (1, 3)
    assert whole_shares((0.7, 0.2, 0.1)) == (7, 2, 1)
    order = Order((9, 9, 9), 1).then(0, (0.7, 0.2, 0.1))
    sources, _ = order.draws(0, 100)
    assert (np.bincount(sources[:10]) == np.bincount(sources[90:])).all()
    assert order.taken(100) == (70, 20, 10)


def test_a_tiny_weight_gets_its_draws() -> None:
    order = Order((5, 5), 0).then(0, (1.0, 1e-7))
    assert order.taken(10**7 + 1) == (10**7, 1)
    assert order.taken(3 * (10**7 + 1)) == (3 * 10**7, 3)


@pytest.mark.parametrize("epochs", [(1.0, 2.0), (0.5, 3.0), (1.0, 0.25)])
def test_epochs_of_a_pass_are_exact(epochs: tuple[float, ...]) -> None:
    lengths = (14, 36)
    draws = [int(number * length) for number, length in zip(epochs, lengths, strict=True)]
    order = Order(lengths, 0).then(0, Stage(epochs=epochs).shares(lengths))
    for passes in range(1, 5):
        assert order.taken(passes * sum(draws)) == tuple(passes * number for number in draws)


def test_the_order_is_pure() -> None:
    order = Order((9, 5), 7).then(0, (2, 1)).then(70, (1, 1))
    whole = np.stack(order.draws(0, 140))
    other = pickle.loads(pickle.dumps(order))
    assert other == order
    parts = [np.stack(other.draws(begin, begin + 20)) for begin in range(120, -1, -20)]
    np.testing.assert_array_equal(np.concatenate(parts[::-1], axis=1), whole)
    assert (np.stack(Order((9, 5), 8, order.stages).draws(0, 140)) != whole).any()


def test_the_shuffle_is_fixed_for_good() -> None:
    """Runs must be repeatable across machines and releases of grain, so the very order is pinned."""
    assert Order((40,), 0).then(0, (1,)).draws(0, 8)[1].tolist() == [39, 7, 23, 25, 17, 28, 10, 12]
    assert Order((3000,), 0).then(0, (1,)).draws(3000, 3008)[1].tolist() == [83, 742, 2545, 2487, 666, 1035, 1925, 2724]


def test_no_list_of_samples_is_held() -> None:
    order = Order((MOST_SAMPLES, 10**9), 0).then(0, (1, 1))
    order.draws(0, 1)
    tracemalloc.start()
    try:
        for first in (0, 10**6, 10**12):
            sources, indices = order.draws(first, first + 100)
            assert (indices < np.array(order.lengths)[sources]).all()
            assert len(set(zip(sources.tolist(), indices.tolist(), strict=True))) == 100
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_is_refused() -> None:
    order = Order((5, 0), 0)
    for weights in ((1, 1), (1,), (-1, 0), (0, 0), (float("nan"), 0), (float("inf"), 0)):
        with pytest.raises(ConfigError, match=r"weights|samples of source 1 is 0, expected at least one"):
            order.then(0, weights)
    with pytest.raises(ConfigError, match="at least 9, where the stage before it begins"):
        order.then(9, (1, 0)).then(8, (1, 0))
    with pytest.raises(ConfigError, match="draw is 8, expected one of the order, which begins at draw 9"):
        order.then(9, (1, 0)).draws(8, 12)
    with pytest.raises(ConfigError, match="samples of source 0 is 4294967297, expected at most 4294967296"):
        Order((MOST_SAMPLES + 1,), 0)
