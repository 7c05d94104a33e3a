"""The row plan of packing: windows of draws, fitted into rows and dealt to steps.

Draws are taken up in their order until they fill `lookahead` steps; `fit.py` puts them into rows and `steps.py` rows
into steps. Draws of rows that wait go on to the next window. So a window is a pure function of the draws carried over
to it, the next draw and the sizes, and that is what a state is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rave_jax.data.packing.sizes import Room, Sizes
from rave_jax.data.skips import Skip
from rave_jax.typing import Int, NpArray

log = logging.getLogger(__name__)

PRIORITY, LONGEST_WAIT = 4, 16
"""Windows after which a draw that waits is placed before others, and after which its row waits for no others."""
KEPT = 32
"""Windows that are remembered."""
AHEAD = 2
"""Windows whose samples are measured ahead."""


class PackedStage(NamedTuple):
    """A stage of the curriculum, as packing needs it.

    Fields:
        step: its first step.
        weights: of the sources.
        room: of its rows.
    """

    step: int
    weights: tuple[float, ...]
    room: Room


class Draws(NamedTuple):
    """Draws that wait for a row.

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


@dataclass(frozen=True)
class State:
    """Where a window begins."""

    step: int
    """Its first step."""
    next_draw: int
    """The first draw that no window before it took up."""
    stages: tuple[int, ...]
    """The first draw of each stage that has begun."""
    waiting: tuple[tuple[int, int], ...]
    """(draw, windows that it has waited) of the draws carried over, by draw."""
    unusable: int
    """Draws before `next_draw` that could not be used, one after another."""


class Window(NamedTuple):
    """Steps that were planned together.

    Fields:
        begin: where it begins.
        end: where the next one begins.
        draws: of all its rows.
        steps: for each step, for each row, the places in `draws` of its documents.
        skips: samples that were left out of it.
    """

    begin: State
    end: State
    draws: Draws
    steps: list[list[Int[NpArray, "N"]]]
    skips: tuple[Skip, ...]
