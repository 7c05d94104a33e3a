"""Rows into steps, so that the tower has as much to do on every device, however the rows are dealt to them.

What the tower has to do is counted in patches. A mesh gives each device equally many rows that lie side by side, so
rows of a step have to be alike, and where they are not, neighbours have to even each other out.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from rave_jax.typing import Bool, Float, Int, NpArray

TRIES = ((0.95, 1.1), (0.9, 1.1), (0.8, 1.1), (0.0, 1.1), (0.0, 1.3), (0.0, math.inf))
"""Rows of a step are at least so full, and the most work of one is so many times their mean: the first that gives a
step."""


def group(
    work: Int[NpArray, "R"], full: Float[NpArray, "R"], due: Bool[NpArray, "R"], rows: int, steps: int
) -> list[Int[NpArray, "R"]]:
    """Steps of rows that are full and have about as much work; what is in no step waits for more documents.

    Args:
        work: of each row.
        full: how much of a row its documents take, 0 to 1.
        due: rows that are not to wait any longer.
        rows: of a step.
        steps: the most steps.

    Returns:
        the rows of each step, at least one step if there are enough rows.
    """
    for least, alike in TRIES:
        found = _alike(work, np.flatnonzero((full >= least) | due), due, rows, steps, alike)
        if found:
            return found
    return []


def _alike(
    work: Int[NpArray, "R"],
    places: Int[NpArray, "S"],
    due: Bool[NpArray, "R"],
    rows: int,
    steps: int,
    alike: float,
) -> list[Int[NpArray, "R"]]:
    """Steps of neighbours among these rows in the order of their work."""
    order = places[np.argsort(-work[places], kind="stable")]
    found: list[Int[NpArray, "R"]] = []
    first = 0
    while first + rows <= len(order) and len(found) < steps:
        block = order[first : first + rows]
        if work[block[0]] * rows <= alike * work[block].sum() or due[block[0]]:
            found.append(block)
            first += rows
        else:
            first += 1
    return found


def arrange(work: Int[NpArray, "R"]) -> Int[NpArray, "R"]:
    """An order of the rows of a step in which neighbours even each other out.

    Rows are put together in groups of each prime factor of their number in turn: the heaviest with the lightest. So
    shards of so many rows that are products of these factors, the smallest first, have about as much work.
    """
    groups = [[row] for row in range(len(work))]
    sums = work.astype(np.int64)
    for factor in _factors(len(work)):
        ranks = np.argsort(-sums, kind="stable")
        count = len(groups) // factor
        # Layer after layer, each dealt from the other end: the first gets the most of one and the least of the next.
        layers = [ranks[n * count : (n + 1) * count] for n in range(factor)]
        dealt = np.stack([layer if n % 2 == 0 else layer[::-1] for n, layer in enumerate(layers)], axis=1)
        groups = [[row for place in places for row in groups[place]] for places in dealt.tolist()]
        sums = sums[dealt].sum(axis=1)
    return np.array(groups[0], np.int64) if groups else np.zeros(0, np.int64)


def balance(work: Int[NpArray, "R"], shards: int) -> float:
    """The most work of a shard over the mean, for equal shards of rows side by side; 1 where there is no work."""
    of_shards = work.reshape(shards, -1).sum(axis=1)
    return float(of_shards.max() * shards / of_shards.sum()) if of_shards.any() else 1.0


@functools.cache
def _factors(number: int) -> tuple[int, ...]:
    """Prime factors, ascending."""
    found = []
    factor = 2
    while number > 1:
        if number % factor:
            factor += 1
        else:
            found.append(factor)
            number //= factor
    return tuple(found)


def shuffled(length: int, *seed: int) -> list[int]:
    """A shuffled range(length): the ranks of counter-based random bits, which no release of numpy changes."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(length)
    return np.argsort(bits, kind="stable").tolist()
