"""Which sample each draw of a run takes: a pure function of the seed and the draw's number, the same on every host.

The draws of a run are numbered from 0; the plan (`plan.py`) says in which row a draw stands. Within a stage of the
curriculum, draws come in blocks; a block holds a fixed number of draws from each source, nearest to the weights, in a
shuffled order. So it is known without drawing them how many samples of a source come before a draw, and a source gives
all its samples once in an epoch, in an order of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from rave_jax.config import require
from rave_jax.typing import Int, NpArray

BLOCK = 1024
"""Draws in a block: weights are kept to one part in this many."""


def shuffled(length: int, *seed: int) -> Int[NpArray, "N"]:
    """A shuffled range(length): the ranks of counter-based random bits, which no release of numpy changes."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(length)
    order = np.argsort(bits, kind="stable").astype(np.int32 if length < 2**31 else np.int64)
    order.setflags(write=False)
    return order


def shares(weights: Sequence[float]) -> Int[NpArray, "N"]:
    """Draws from each source in a block, by largest remainders of the weights.

    Raises:
        ConfigError: a weight that is not 0 is too small to get a draw.
    """
    parts = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
    counts = np.floor(parts).astype(np.int64)
    # A stable sort, so equal remainders are settled by the order of the sources on every machine.
    counts[np.argsort(counts - parts, kind="stable")[: BLOCK - counts.sum()]] += 1
    for weight, count in zip(weights, counts, strict=True):
        require(weight == 0 or count > 0, "weights", tuple(weights), f"each 0 or at least 1/{BLOCK} of the whole")
    return counts


class Order:
    """What every draw of a run takes.

    Args:
        lengths: samples of each source.
        stages: (first draw, weight of each source), ascending, the first at draw 0.
        seed: of all shuffles.
    """

    def __init__(self, lengths: Sequence[int], stages: Sequence[tuple[int, Sequence[float]]], seed: int):
        self._lengths = tuple(lengths)
        # Neighbouring draws share a block and an epoch; two epochs of each source are in use where one ends.
        self._block = functools.lru_cache(maxsize=16)(self._make_block)
        self._epoch = functools.lru_cache(maxsize=2 * len(lengths))(self._make_epoch)
        self._seed = seed
        self._firsts = [first for first, _ in stages]
        self._shares = [shares(weights) for _, weights in stages]
        self._drawn = [np.zeros(len(lengths), np.int64)]
        for number in range(1, len(stages)):
            self._drawn.append(self._before(number - 1, self._firsts[number]))

    def _make_block(self, stage: int, block: int) -> Int[NpArray, "N"]:
        sources = np.repeat(np.arange(len(self._lengths)), self._shares[stage])
        return sources[shuffled(BLOCK, self._seed, 1, stage, block)]

    def _make_epoch(self, source: int, epoch: int) -> Int[NpArray, "N"]:
        return shuffled(self._lengths[source], self._seed, 2, source, epoch)

    def _before(self, stage: int, draw: int) -> Int[NpArray, "N"]:
        """Samples drawn from each source before `draw` of `stage`."""
        block, inside = divmod(draw - self._firsts[stage], BLOCK)
        part = np.bincount(self._block(stage, block)[:inside], minlength=len(self._lengths))
        return self._drawn[stage] + block * self._shares[stage] + part

    def source_of(self, draw: int) -> tuple[int, int]:
        """(source, how many draws from it come before) of a draw."""
        stage = int(np.searchsorted(self._firsts, draw, side="right")) - 1
        block, inside = divmod(draw - self._firsts[stage], BLOCK)
        source = int(self._block(stage, block)[inside])
        return source, int(self._before(stage, draw)[source])

    def index(self, source: int, number: int) -> int:
        """Index in its source of the sample that its draw `number` takes: one shuffled epoch after another."""
        epoch, inside = divmod(number, self._lengths[source])
        return int(self._epoch(source, epoch)[inside])
