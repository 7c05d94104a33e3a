"""Which samples packing uses: those that can be, that the filters keep and that a row holds."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rave_jax.config import to_json
from rave_jax.data.filters import LIMITS, SizeFilter
from rave_jax.data.packing.cutting import Cut, longest_cut
from rave_jax.data.packing.index import USABLE, SizeIndex
from rave_jax.data.packing.sizes import Room, Sizes
from rave_jax.data.processor import Processor
from rave_jax.data.sample import OverBudget, SampleError, Source
from rave_jax.data.skips import Skip
from rave_jax.typing import Int, NpArray

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """What becomes of samples.

    Fields:
        sizes: of what is used of each.
        messages: kept of a conversation that is cut; 0 for all of them.
        reasons: why a sample is not used, by its place.
        filtered: places of those that a filter leaves out, as the config asks.
    """

    sizes: Sizes
    messages: Int[NpArray, "N"]
    reasons: dict[int, str]
    filtered: frozenset[int]


class Choice:
    """Says which samples are used. Use it from any thread."""

    def __init__(
        self,
        index: SizeIndex,
        sources: Sequence[Source],
        processor: Processor,
        filters: Sequence[SizeFilter] = (),
        long: Literal["skip", "cut"] = "skip",
        *,
        fails: bool = False,
        max_skips: int = 100,
    ):
        """
        Args:
            index: of the sizes.
            sources: of the samples.
            processor: of the run.
            filters: leave samples out.
            long: what becomes of conversations that no row holds.
            fails: is a sample that cannot be used an error?
            max_skips: samples one after another that may be unusable.
        """
        self.index, self.max_skips, self.fails = index, max_skips, fails
        self._sources, self._processor, self._filters, self._long = tuple(sources), processor, tuple(filters), long
        self._cuts: dict[tuple[int, int, Room], Cut | None] = {}
        self._said: set[tuple[int, str]] = set()

    def facts(self) -> dict[str, Any]:
        """What a run that goes on has to have again."""
        return {"filters": to_json(self._filters)}

    def ahead(self, sources: Int[NpArray, "N"], indices: Int[NpArray, "N"]) -> None:
        """Begin to measure samples."""
        self.index.ahead(sources, indices)

    def choose(self, sources: Int[NpArray, "N"], indices: Int[NpArray, "N"], room: Room) -> Chosen:
        """What becomes of these samples."""
        known = self.index.known(sources, indices)
        sizes = Sizes(*(column.copy() for column in known.sizes))
        messages = np.zeros(len(indices), np.int32)
        usable = known.status == USABLE
        reasons = {place: self.index.reason(int(known.status[place])) for place in np.flatnonzero(~usable).tolist()}
        reasons |= dict.fromkeys(np.flatnonzero(usable & ~room.holds(sizes)).tolist(), OverBudget.reason)
        if self._long == "cut":
            for place in [place for place, reason in reasons.items() if reason == OverBudget.reason]:
                cut = self._cut(int(sources[place]), int(indices[place]), room)
                if cut is not None:
                    del reasons[place]
                    messages[place] = cut.messages
                    for column, number in zip(sizes, cut.size, strict=True):
                        column[place] = number
        filtered: set[int] = set()
        for each in self._filters:
            mine = np.ones(len(indices), bool) if each.source is None else sources == each.source
            for reason, outside in each.faults(sizes).items():
                found = [place for place in np.flatnonzero(mine & outside).tolist() if place not in reasons]
                reasons |= dict.fromkeys(found, reason)
                filtered.update(found)
        return Chosen(sizes, messages, reasons, frozenset(filtered))

    def skip(self, source: int, index: int, reason: str, room: Room) -> Skip:
        """The skip of a sample. What is wrong with it is looked at once for each source and reason."""
        name = self._sources[source].name
        if (source, reason) in self._said:
            return Skip(name, index, reason, f"{name}, sample {index}")
        self._said.add((source, reason))
        found = self.index.what_is_wrong(source, index)
        message, size = found.message, found.size
        if found.reason:
            return Skip(name, index, reason, message)
        called = self._sources[source][index].called
        message = f"{called}: {size.tokens} tokens and {size.patches} patches"
        if reason == OverBudget.reason:
            message += f", over the budget of {room.tokens} tokens and {room.patches} patches"
            message += f" or {room.regions} regions" if size.regions > room.regions else ""
            return Skip(name, index, reason, message, size.tokens, size.patches)
        if reason in LIMITS:
            return Skip(name, index, reason, f"{message}, {reason} of a filter")
        return Skip(name, index, reason, f"{called}: it was mended after it was measured; the next run uses it")

    def _cut(self, source: int, index: int, room: Room) -> Cut | None:
        key = source, index, room
        if key not in self._cuts:
            try:
                sample = self._sources[source][index]
                self._cuts[key] = cut = longest_cut(sample, self._processor, room)
            except SampleError:
                self._cuts[key] = cut = None
            here = multiprocessing.parent_process() is None  # processes that load say nothing
            if cut is not None and here and (source, "cut") not in self._said:
                self._said.add((source, "cut"))
                log.warning(
                    "cut %s: %d of its %d messages are kept; further ones are only counted",
                    sample.called,
                    cut.messages,
                    len(sample.messages),
                )
        return self._cuts[key]
