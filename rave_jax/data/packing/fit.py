"""Documents into rows: pictures spread evenly over some rows, and tokens filled by best fit.

Pure functions of integers, so that every process of a job has the same rows. Three passes:

1. Long texts, which no row would hold beside its part of the pictures, each into the row with the most tokens left.
2. Documents with pictures, those with the most patches first, each into the row that has the fewest patches (longest
   processing time first; Graham, "Bounds on Multiprocessing Timing Anomalies", 1969), as long as a row stays within
   its even share of the patches. Where pictures are few or large, a part of the rows gets all of them.
3. All others, the longest first, each into the row with the least tokens left that holds it (best fit decreasing;
   Johnson, "Near-Optimal Bin Packing Algorithms", 1973), as long as the row's patches stay near the even share.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from typing import Any

import numpy as np

from rave_jax.data.packing.sizes import Room, Sizes
from rave_jax.typing import Bool, Int, NpArray

LOOKS = 32
"""Rows that are looked at for a document with pictures before it goes where its patches stand out."""
SLACK = 20
"""A row's patches may pass the even share by one part in this many while others can take the document."""
EVEN = 16
"""Pictures are spread evenly up to the even share less one part in this many; those behind go where they fit best."""
LARGEST = 1.25
"""The even share of the patches is at least so many times those of the largest document, if rows can hold as much."""
FULL = 0.8
"""Part of a row that its pictures may fill, by plan."""


def fit(
    sizes: Sizes, due: Bool[NpArray, "N"], room: Room, rows: int, group: int, *, last: bool = False
) -> Int[NpArray, "N"]:
    """The row of each document, or -1 for those that are left over.

    Args:
        sizes: of the documents, each of which a row of its own would hold.
        due: documents that are placed before all others.
        room: of a row.
        rows: how many there are.
        group: rows of a step. Of rows with pictures and of rows without there are whole steps, where that can be.
        last: do no rows follow, so that documents stand where they fit rather than wait?
    """
    found = np.full(len(sizes.tokens), -1, np.int32)
    seen = sizes.patches > 0
    held = _with_pictures(sizes.take(seen), room, rows, group)
    share = -(-int(sizes.patches.sum()) // held) if held else 0
    beside = room.tokens - int(sizes.tokens[seen].sum()) // max(held, 1)
    # Few patches for its length: less than the mean, compared without a division.
    wide = Sizes(*(column.astype(np.int64) for column in sizes))
    sparse = wide.patches * wide.tokens.sum() <= wide.tokens * wide.patches.sum()
    early = due | ((sizes.tokens > beside) & sparse) if held else due
    filling = _Rows(room, rows, held)
    columns = list(zip(*(column.tolist() for column in sizes[:3]), strict=True))

    def ordered(places: Any, *keys: Any) -> list[int]:
        """The places by these keys, the first of which counts most; equal ones keep their order."""
        return places[np.lexsort([key[places] for key in reversed(keys)])].tolist()

    for place in ordered(np.flatnonzero(early & seen), ~due, -sizes.patches, -sizes.tokens):
        found[place] = filling.evenly(*columns[place], room.patches)
    for place in ordered(np.flatnonzero(early & ~seen), ~due, -sizes.tokens):
        found[place] = filling.widest(columns[place][0])
    later: list[int] = []
    for place in ordered(np.flatnonzero(seen & ~early), -sizes.patches, -sizes.tokens):
        found[place] = filling.evenly(*columns[place], share - share // EVEN)
        if found[place] < 0:
            later.append(place)
    filling.sort()
    late = np.concatenate([np.array(later, np.int64), np.flatnonzero(~seen & ~early)])
    for place in ordered(late, -sizes.tokens):
        found[place] = filling.tightly(*columns[place], share + share // SLACK)
    if last:
        for place in ordered(np.flatnonzero(found < 0), -sizes.tokens):
            found[place] = filling.anywhere(*columns[place])
    return found


def _with_pictures(sizes: Sizes, room: Room, rows: int, group: int) -> int:
    """How many rows get the documents with pictures, of which these are all."""
    if not len(sizes.tokens):
        return 0
    patches, tokens, regions = (int(column.sum()) for column in (sizes.patches, sizes.tokens, sizes.regions))
    needs = [patches / room.patches, tokens / room.tokens]
    needs += [regions / room.regions] if regions else []
    least = max(*needs, len(sizes.tokens) / room.documents) / FULL
    wanted = patches / (LARGEST * int(sizes.patches.max()))
    steps = max(-(-least // group), wanted // group, 1)
    return min(rows, int(steps) * group)


class _Rows:
    """Rows that fill up, the first `held` of them with pictures."""

    def __init__(self, room: Room, rows: int, held: int):
        self._room = room
        self._tokens = [room.tokens] * rows
        """Tokens left in each row."""
        self._patches = [0] * rows
        self._regions = [0] * rows
        self._documents = [0] * rows
        self._bits = rows.bit_length()
        self._mask = (1 << self._bits) - 1
        self._wide = [-room.tokens << self._bits | row for row in range(rows)]
        """A heap of (-tokens left, row)."""
        self._even = list(range(held))
        """A heap of (patches, row) of the rows with pictures."""
        self._parked: list[int] = []
        """A heap of (-tokens left, row): rows that are not in `_even` because a document was too long for them."""
        self._tight: list[int] = []
        """(tokens left, row), ascending."""

    def widest(self, tokens: int) -> int:
        """Put a document without pictures into the row with the most tokens left; -1: it does not fit there."""
        wide, bits, mask = self._wide, self._bits, self._mask
        while wide and -(wide[0] >> bits) != self._tokens[wide[0] & mask]:  # other documents were put there since
            heapq.heapreplace(wide, -self._tokens[wide[0] & mask] << bits | wide[0] & mask)
        if not wide or not self._holds(row := wide[0] & mask, tokens, 0, 0):
            return -1
        self._put(row, tokens, 0, 0)
        heapq.heapreplace(wide, wide[0] + (tokens << bits))
        return row

    def evenly(self, tokens: int, patches: int, regions: int, share: int) -> int:
        """Put a document into the row with the fewest patches that holds it, if that stays within the share or has
        none; -1: it does not."""
        bits, mask, parked, even = self._bits, self._mask, self._parked, self._even
        while parked and -(parked[0] >> bits) >= tokens:
            row = heapq.heappop(parked) & mask
            heapq.heappush(even, self._patches[row] << bits | row)
        aside: list[int] = []
        chosen = -1
        while even and len(aside) < LOOKS:
            key = even[0]
            row, before = key & mask, key >> bits
            if before and before + patches > share:
                break
            if self._tokens[row] < tokens:
                heapq.heappop(even)
                heapq.heappush(parked, -self._tokens[row] << bits | row)
            elif self._holds(row, tokens, patches, regions):
                self._put(row, tokens, patches, regions)
                heapq.heapreplace(even, key + (patches << bits))
                chosen = row
                break
            else:
                aside.append(heapq.heappop(even))
        for key in aside:
            heapq.heappush(even, key)
        return chosen

    def sort(self) -> None:
        """Begin the last pass."""
        most = self._room.documents
        self._tight = sorted(
            left << self._bits | row for row, left in enumerate(self._tokens) if self._documents[row] < most
        )

    def tightly(self, tokens: int, patches: int, regions: int, most: int) -> int:
        """Put a document into the row with the least tokens left that holds it, one with pictures only where patches
        stay within `most`; -1: no row holds it."""
        first = bisect_left(self._tight, tokens << self._bits)
        last = len(self._tight)
        if patches:
            chosen = self._near(first, min(last, first + LOOKS), tokens, patches, regions, most)
            if chosen < 0:  # a look at some of the others
                step = max(1, (last - first) // LOOKS)
                chosen = self._near(first, last, tokens, patches, regions, most, step)
        else:
            chosen = first if first < last else -1
        if chosen < 0:
            return -1
        key = self._tight.pop(chosen)
        row = key & self._mask
        self._put(row, tokens, patches, regions)
        if self._documents[row] < self._room.documents:
            insort(self._tight, key - (tokens << self._bits))
        return row

    def anywhere(self, tokens: int, patches: int, regions: int) -> int:
        """Put a document into the first row that holds it; -1: none does."""
        found = (row for row in range(len(self._tokens)) if self._holds(row, tokens, patches, regions))
        row = next(found, -1)
        if row >= 0:
            self._put(row, tokens, patches, regions)
        return row

    def _near(self, first: int, last: int, tokens: int, patches: int, regions: int, most: int, step: int = 1) -> int:
        """Place in `_tight` of the first row with pictures that holds a document within `most` patches; -1: none."""
        for place in range(first, last, step):
            row = self._tight[place] & self._mask
            before = self._patches[row]
            if before and before + patches <= most and self._holds(row, tokens, patches, regions):
                return place
        return -1

    def _holds(self, row: int, tokens: int, patches: int, regions: int) -> bool:
        room = self._room
        return (
            self._tokens[row] >= tokens
            and self._patches[row] + patches <= room.patches
            and (not regions or self._regions[row] + regions <= room.regions)
            and self._documents[row] < room.documents
        )

    def _put(self, row: int, tokens: int, patches: int, regions: int) -> None:
        self._tokens[row] -= tokens
        self._patches[row] += patches
        self._regions[row] += regions
        self._documents[row] += 1
