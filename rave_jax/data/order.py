"""Which sample each draw of a run takes: a pure function of lengths, weights and the seed, the same on every host.

The draws of a run are numbered from 0; the plan (`plan.py`) says in which row the sample of a draw stands. Sources are
grain's: each is shuffled anew for every epoch, and gives each of its samples once in an epoch. A stage mixes them by
its weights, and goes on in each source where the stage before it stopped. No list of samples is held, whatever their
number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from rave_jax.config import require
from rave_jax.typing import Int, NpArray

MOST_SAMPLES = 2**32
"""Samples of a source: grain shuffles numbers of 32 bits."""
WALK, FEW = 2**16, 2**10
"""The least range that grain shuffles, and samples of a source from which on it is shuffled as it is."""

ROUNDS = 4
"""Of grain's shuffle."""


class Stage(NamedTuple):
    """Draws that mix the sources in one way.

    Fields:
        first: its first draw.
        shares: draws of each source among every `sum(shares)` draws of the stage, in lowest terms.
        taken: samples that were drawn of each source before it.
    """

    first: int
    shares: tuple[int, ...]
    taken: tuple[int, ...]


class Restart(NamedTuple):
    """Where a source that has changed began anew.

    Fields:
        taken: samples that were drawn of it before.
        number: the number, from then on, of its next draw; a multiple of its length, so that an epoch begins.
    """

    taken: int = 0
    number: int = 0

    def number_of(self, taken: int) -> int:
        """The number, counted in samples of its epochs, of the draw before which so many were drawn of the source."""
        return taken if taken < self.taken else taken - self.taken + self.number


@dataclass(frozen=True)
class Order:
    """What every draw of a run takes. Plain data: it can be compared, pickled and used from any thread."""

    lengths: tuple[int, ...]
    """Samples of each source."""
    seed: int
    """Of all shuffles."""
    stages: tuple[Stage, ...] = ()
    """In the order of their first draws; `then` adds one."""
    restarts: tuple[Restart, ...] = ()
    """Of each source; empty where none has changed since the run began (`state.py`)."""

    def __post_init__(self) -> None:
        for number, length in enumerate(self.lengths):
            require(0 <= length <= MOST_SAMPLES, f"samples of source {number}", length, f"at most {MOST_SAMPLES}")

    def then(self, first: int, weights: Sequence[float | Fraction]) -> Order:
        """The same order up to draw `first`, and from there on sources mixed by other weights.

        After any n draws of a stage each source has given its share of them, to within one draw for each source.
        Weights count as they are written in decimals: 0.1 and 0.3 mix exactly 1 to 3.

        Args:
            first: a draw, not before the first of the last stage.
            weights: of each source, 0 or more, not all 0.

        Raises:
            ConfigError: weights that are not so, or a source without samples has a weight.
        """
        shares = whole_shares(weights)
        require(
            len(shares) == len(self.lengths), "weights", tuple(weights), f"{len(self.lengths)}, one for each source"
        )
        for number, (share, length) in enumerate(zip(shares, self.lengths, strict=True)):
            require(share == 0 or length > 0, f"samples of source {number}", length, "at least one: it has a weight")
        last = self.stages[-1].first if self.stages else 0
        require(first >= last, "first draw of a stage", first, f"at least {last}, where the stage before it begins")
        return replace(self, stages=(*self.stages, Stage(first, shares, self.taken(first))))

    def taken(self, draw: int) -> tuple[int, ...]:
        """Samples drawn of each source before a draw."""
        if not self.stages:
            return (0,) * len(self.lengths)
        stage = self._stage(draw)
        counts = given(draw - stage.first, stage.shares)
        return tuple(taken + count for taken, count in zip(stage.taken, counts, strict=True))

    def draws(self, first: int, stop: int) -> tuple[Int[NpArray, "N"], Int[NpArray, "N"]]:
        """The samples of draws first..stop-1: the source of each, and the index in it.

        Raises:
            ConfigError: a draw before the first stage.
        """
        if first >= stop:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        parts = []
        while first < stop:
            stage = self._stage(first)
            end = min([stop, *(each.first for each in self.stages if each.first > first)])
            parts.append(self._of_stage(stage, first, end))
            first = end
        sources, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
        return sources, indices

    def _of_stage(self, stage: Stage, first: int, stop: int) -> tuple[Int[NpArray, "N"], Int[NpArray, "N"]]:
        """The samples of draws of one stage."""
        sources, taken = turns(first - stage.first, stop - stage.first, stage.shares)
        indices = np.zeros(stop - first, np.int64)
        for source, length in enumerate(self.lengths):
            restart = self.restarts[source] if self.restarts else Restart()
            mine = np.flatnonzero(sources == source)
            numbers = [restart.number_of(stage.taken[source] + count) for count in taken[mine].tolist()]
            indices[mine] = _shuffled(length, _seed(self.seed, source), numbers)
        return sources, indices

    def _stage(self, draw: int) -> Stage:
        for stage in reversed(self.stages):
            if stage.first <= draw:
                return stage
        begin = self.stages[0].first if self.stages else None
        require(False, "draw", draw, f"one of the order, which begins at draw {begin}")
        raise AssertionError


def whole_shares(weights: Sequence[float | Fraction]) -> tuple[int, ...]:
    """Weights as whole numbers in lowest terms, each in its exact proportion to the others.

    Raises:
        ConfigError: a weight is negative or not finite, or all are 0.
    """
    good = all(0 <= weight < math.inf for weight in weights) and any(weights)
    require(good, "weights", tuple(weights), "numbers of 0 or more, not all 0")
    exact = [weight if isinstance(weight, Fraction) else Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return tuple(number // math.gcd(*whole) for number in whole)


def given(draws: int, shares: Sequence[int]) -> tuple[int, ...]:
    """Samples that each source has given after so many draws: the rule of `grain.MapDataset.mix`, with exact shares.

    The first source has its share of the draws, rounded up; the next has its share of what is left, and so on.
    """
    counts, left, of = [], draws, sum(shares)
    for share in shares:
        rest = left * (of - share) // of if of else 0
        counts.append(left - rest)
        left, of = rest, of - share
    return tuple(counts)


def turns(first: int, stop: int, shares: Sequence[int]) -> tuple[Int[NpArray, "N"], Any]:
    """Which source each of draws first..stop-1 of a stage takes, and how many samples that source has given before.

    `grain.MapDataset.mix` rounds the weights to 1 % of the least one, with which the sources would not end their
    epochs together where the config says so. This is its rule (`given`) without the rounding.
    """
    of = sum(shares)
    wide = stop * of >= 2**63
    before: Any = np.array(range(first, stop), object) if wide else np.arange(first, stop)
    after = before + 1
    sources, counts = np.full(stop - first, -1, np.int64), np.zeros_like(before)
    for source, share in enumerate(shares):
        rest, rest_after = before * (of - share) // of, after * (of - share) // of
        own = (sources < 0) & (before - rest != after - rest_after).astype(bool)
        sources[own], counts[own] = source, (before - rest)[own]
        before, after, of = rest, rest_after, of - share
        if not of:
            break
    return sources, counts


def _seed(seed: int, source: int) -> int:
    return int(np.random.SeedSequence((seed, source)).generate_state(1)[0])


def _shuffled(length: int, seed: int, numbers: Sequence[int]) -> list[int]:
    """What stands at these places of range(length), shuffled anew for every epoch without end.

    It is `grain.MapDataset.range(length).shuffle(seed).repeat()`, whose rule is taken because a call of the data sets
    for each number takes ten times as long. Few samples take the order of as many of 2^16 shuffled numbers instead,
    since grain finds the place of a number by walking through at least 2^16 others until one is below the length.
    """
    from grain.experimental import index_shuffle  # grain imports jax, which not all users of this file do

    if length < FEW:
        return [_epoch(length, seed, number // length)[number % length] for number in numbers]
    last = length - 1
    return [
        index_shuffle(number % length, max_index=last, seed=(seed + number // length) % 2**32, rounds=ROUNDS)
        for number in numbers
    ]


@functools.lru_cache(maxsize=64)
def _epoch(length: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch of few samples."""
    from grain.experimental import index_shuffle

    keys = [index_shuffle(n, max_index=WALK - 1, seed=(seed + epoch) % 2**32, rounds=ROUNDS) for n in range(length)]
    return np.argsort(keys).tolist()
