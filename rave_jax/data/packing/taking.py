"""Draws are taken up in their order, until they fill so many rows or an epoch ends."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rave_jax.data.order import Order, Restart
from rave_jax.data.packing.choice import Choice
from rave_jax.data.packing.sizes import Room, Sizes
from rave_jax.data.sample import SampleError
from rave_jax.data.skips import Skip, describe
from rave_jax.typing import Int, NpArray

BLOCK = 1024
"""Draws that are asked of the order in one go."""
FIRST = 256
"""Draws that are looked at for how many of them a row takes."""


class Waiting(NamedTuple):
    """Draws that are carried over to a window.

    Fields:
        draw: its number.
        source, index: its sample.
        waited: windows that it has waited.
    """

    draw: Int[NpArray, "N"]
    source: Int[NpArray, "N"]
    index: Int[NpArray, "N"]
    waited: Int[NpArray, "N"]


NOTHING = Waiting(*(np.zeros(0, np.int64) for _ in Waiting._fields))


@functools.lru_cache(maxsize=64)
def _block(order: Order, number: int) -> tuple[Int[NpArray, "N"], Int[NpArray, "N"]]:
    return order.draws(number * BLOCK, (number + 1) * BLOCK)


def drawn(order: Order, first: int, stop: int) -> tuple[Int[NpArray, "N"], Int[NpArray, "N"]]:
    """The source and index of draws first..stop-1. They are asked for twice, ahead and when they are taken."""
    if stop <= first:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    begin = first // BLOCK
    blocks = [_block(order, number) for number in range(begin, -(-stop // BLOCK))]
    sources, indices = (np.concatenate(column) for column in zip(*blocks, strict=True))
    span = slice(first - begin * BLOCK, stop - begin * BLOCK)
    return sources[span], indices[span]


def waiting_again(waiting: Sequence[tuple[int, int]], order: Order) -> Waiting:
    """Draws that wait, from their numbers and how many windows they have waited."""
    found = [drawn(order, draw, draw + 1) for draw, _ in waiting]
    columns = ([draw for draw, _ in waiting], [s[0] for s, _ in found], [i[0] for _, i in found])
    return Waiting(*(np.array(column, np.int64) for column in (*columns, [waited for _, waited in waiting])))


class Draws(NamedTuple):
    """Draws that are to get a row.

    Fields:
        draw: its number.
        source, index: its sample.
        waited: windows that it has waited.
        messages: kept of its conversation; 0 for all of them.
        sizes: of what is kept.
    """

    draw: Int[NpArray, "N"]
    source: Int[NpArray, "N"]
    index: Int[NpArray, "N"]
    waited: Int[NpArray, "N"]
    messages: Int[NpArray, "N"]
    sizes: Sizes

    def take(self, places: Any) -> Draws:
        """The draws at these places."""
        return Draws(*(column[places] for column in self[:-1]), self.sizes.take(places))

    def also(self, others: Draws) -> Draws:
        """These, and others behind them."""
        columns = (np.concatenate(pair) for pair in zip(self[:-1], others[:-1], strict=True))
        sizes = (np.concatenate(pair) for pair in zip(self.sizes, others.sizes, strict=True))
        return Draws(*columns, Sizes(*sizes))

    def waiting(self) -> Waiting:
        """These draws, carried over."""
        return Waiting(self.draw, self.source, self.index, self.waited + 1)


class Taking:
    """Draws of one window.

    Attributes:
        draws: those that can be used.
        skips: samples that cannot.
        next_draw: the first draw that was not taken up.
        unusable: draws before it that could not be used, one after another.
        at_end: was the end of an epoch reached?
    """

    def __init__(self, choice: Choice, order: Order, room: Room, next_draw: int, waiting: Waiting, unusable: int):
        """
        Args:
            choice: says which samples are used.
            order: of the samples.
            room: of a row.
            next_draw: the first draw to take up.
            waiting: draws carried over. They may be too large for the rows of a new stage.
            unusable: draws before `next_draw` that could not be used, one after another.
        """
        self._choice, self._order, self._room = choice, order, room
        self.next_draw, self.unusable, self.at_end = next_draw, unusable, False
        self.skips: list[Skip] = []
        self._idle = 0
        self.draws = self._usable(waiting, counts=False)

    def take(self, rows: int = 0, documents: int = 0, whole_epochs: bool = False) -> None:
        """Take up draws until they fill so many rows, or are so many.

        Raises:
            SampleError: too many samples one after another cannot be used.
        """
        carried = len(self.draws.draw) > 0
        end = self._end_of_epoch(carried) if whole_epochs else None
        while self._filled() < rows or len(self.draws.draw) < documents:
            if end is not None and self.next_draw >= end:
                if len(self.draws.draw):
                    self.at_end = True
                    return
                end = self._end_of_epoch(False)  # no sample of the epoch could be used
            count = self._missing(rows, documents)
            stop = self.next_draw + count if end is None else min(self.next_draw + count, end)
            sources, indices = drawn(self._order, self.next_draw, stop)
            draw = np.arange(self.next_draw, stop)
            self.next_draw = stop
            self.draws = self.draws.also(
                self._usable(Waiting(draw, sources, indices, np.zeros_like(draw)), counts=True)
            )

    def _filled(self) -> float:
        return self._room.rows(self.draws.sizes) if len(self.draws.draw) else 0.0

    def _missing(self, rows: int, documents: int) -> int:
        """Draws to take up next."""
        have = len(self.draws.draw)
        if documents:
            return documents - have
        if have < FIRST:
            return min(FIRST, max(rows, 1))
        return max(math.ceil((rows - self._filled()) / self._filled() * have), 1)

    def _end_of_epoch(self, carried: bool) -> int | None:
        """The draw that begins the next epoch; the same as `next_draw` where draws of the last one still wait."""
        stage = self._order.stages[-1]
        restarts = self._order.restarts or (Restart(),) * len(stage.taken)
        taken = [count - restart.taken for count, restart in zip(stage.taken, restarts, strict=True)]
        found = epoch_length(self._order.lengths, stage.shares, taken)
        if found is None:
            return None
        first, each = found
        behind = self.next_draw - stage.first - first
        over = -(-behind // each) if carried else behind // each + 1
        return stage.first + first + max(over, 0) * each

    def _usable(self, taken: Waiting, counts: bool) -> Draws:
        """Those of some draws that are used; the others become skips.

        Args:
            taken: the draws.
            counts: do they follow each other, so that unusable ones are counted?
        """
        chosen = self._choice.choose(taken.source, taken.index, self._room)
        last = -1
        row: list[Skip] = []
        for place in sorted(chosen.reasons):
            reason = chosen.reasons[place]
            skip = self._choice.skip(int(taken.source[place]), int(taken.index[place]), reason, self._room)
            self.skips.append(skip)
            if not counts:
                continue
            if place > last + 1:
                self.unusable, self._idle, row = 0, 0, []
            self._idle += 1
            last = place
            if place not in chosen.filtered:
                self.unusable += 1
                row.append(skip)
                self._check(row)
            elif self._idle > sum(self._order.lengths):
                raise SampleError(f"no sample is left over by the filters of data.filters; the last: {skip.message}")
        if counts and last + 1 < len(taken.draw):
            self.unusable, self._idle = 0, 0
        used = np.ones(len(taken.draw), bool)
        used[list(chosen.reasons)] = False
        return Draws(*taken, chosen.messages, chosen.sizes).take(used)

    def _check(self, skips: Sequence[Skip]) -> None:
        """Raise SampleError where a sample cannot be used and that is an error, or too many cannot."""
        if self._choice.fails:
            raise SampleError(f"{skips[-1].source}: {skips[-1].message}")
        if self.unusable > self._choice.max_skips:
            raise SampleError(
                f"{self.unusable} consecutive samples cannot be used: {describe(skips)}; "
                f"the last: {skips[-1].source}: {skips[-1].message}"
            )


def epoch_length(lengths: Sequence[int], shares: Sequence[int], taken: Sequence[int]) -> tuple[int, int] | None:
    """Where all sources that a stage mixes end epochs together.

    Args:
        lengths: samples of each source.
        shares: draws of each source among every `sum(shares)` draws of the stage.
        taken: samples drawn of each source before the stage, counted from where an epoch of it begins.

    Returns:
        (draws of the stage up to the first such place, draws from one to the next); None where there is none that
        a rule as simple as this finds: one source, or several that begin with whole epochs.
    """
    mixed = [number for number, share in enumerate(shares) if share]
    if len(mixed) == 1:
        length = lengths[mixed[0]]
        return length - taken[mixed[0]] % length, length
    if any(taken[number] % lengths[number] for number in mixed):
        return None
    rounds = math.lcm(*(lengths[n] // math.gcd(lengths[n], shares[n]) for n in mixed))
    return rounds * sum(shares), rounds * sum(shares)
