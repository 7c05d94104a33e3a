"""How generation is sized: what is compiled is decided here, before the first request comes."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from rave_jax.attention import CacheType, RegionMemory, RegionReach
from rave_jax.config import require
from rave_jax.families.config import PatchSizes
from rave_jax.layout import VisualLayout


@dataclass(frozen=True)
class SlotConfig:
    """Slots of generation: how many answers are generated at once, and how long prompts and answers may be."""

    slots: int = 8
    """Answers that are generated at once. A slot whose answer is finished takes the next prompt without compiling."""
    max_length: int = 4096
    """Most tokens of a prompt and its answer together, visual tokens included: the cache's room for each slot. The
    answer's last token needs no room, and a prompt has to leave room for at least one token."""
    max_text: int | None = None
    """Most tokens of a prompt and its answer outside regions: text and context tokens. Only for a model with regions
    (Gaze), whose cache keeps visual tokens apart and has room for this many others. None: as many as `max_length`."""
    max_kept: int | None = None
    """Most tokens of a prompt and its answer that are kept behind a layer after which tokens leave: the cache's room
    there. Only for a model with a mechanism that lets tokens leave (Pruning, Dyvte). None: as many as `max_length`."""
    max_prompt: int | None = None
    """Most tokens of a prompt; None: all that leave room for one answer token."""
    max_patches: int | None = None
    """Most patches of a prompt's pictures; None: as many as its tokens allow."""
    chunk: int = 512
    """Most tokens of a prompt that are read at once; a longer prompt is read in several chunks. With a mechanism whose
    tokens see later ones (Mma, Croc, Cca) every prompt is read at once, and a longer one needs more memory."""
    smallest: int = 64
    """Smallest number of tokens that a program is compiled for; from there up there are two sizes for each doubling."""
    patches: int = 4096
    """Most patches that go through the tower at once: pictures are read in groups. A picture that has more patches is
    read alone."""
    prefill_rows: int = 1
    """Prompts that are read together. More reads many short prompts faster, but a free slot may wait for
    other prompts."""
    decode_steps: int = 8
    """Most tokens of an answer between two checks by the host (stop strings, streaming). A freed slot ends them early
    while prompts wait."""
    cache: CacheType = "compute"
    """Number type of cached keys and values: as computed, bfloat16, or int8 with a scale per token and head."""
    regions_in: RegionMemory = "device"
    """Where keys and values of regions lie: on the device, or in host memory, from where a step copies those that it
    chose. Only for a model with regions (Gaze), on one device."""
    max_stop_ids: int = 8
    """Most token ids that may end one answer, those of the model included."""
    request_timeout: float = 3600.0
    """Most seconds from the start of reading a prompt to the end of its answer, without the time of compiling. A longer
    answer ends with an error and others continue; in a job of several processes the clock of the first decides. A
    program on the device that takes half an hour longer ends the process. 0: no limit."""

    def __post_init__(self) -> None:
        for name in ("slots", "chunk", "smallest", "patches", "prefill_rows", "decode_steps", "max_stop_ids"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        limit = self.request_timeout
        require(0 <= limit < math.inf, "request_timeout", limit, "a number of seconds, or 0 for no limit")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2, a prompt and an answer token")
        given = self.max_text
        allowed = f"2 to `max_length` ({self.max_length}), or None"
        require(given is None or 2 <= given <= self.max_length, "max_text", given, allowed)
        given = self.max_kept
        require(given is None or 2 <= given <= self.max_length, "max_kept", given, allowed)
        require(self.max_prompt is None or self.max_prompt >= 1, "max_prompt", self.max_prompt, "at least 1, or None")
        given = self.max_patches
        require(given is None or given >= 0, "max_patches", given, "0 (no pictures) or more, or None")
        places = get_args(RegionMemory)
        require(self.regions_in in places, "regions_in", self.regions_in, " or ".join(places))
        require(self.prefill_rows <= self.slots, "prefill_rows", self.prefill_rows, f"at most `slots` ({self.slots})")


class Buckets:
    """The few sizes that are compiled.

    Attributes:
        lengths: of prompts, ascending. The last holds `max_length`. Up to a chunk there are two to a doubling, beyond
            it one.
        kept: most entries of a row of the cache behind a layer after which tokens leave.
        reaches: how many entries of a row of the cache a program reads and writes, ascending: those of the lengths, or
            with regions, whose entries are apart, of tokens of no region.
        chunk: most tokens of a prompt read at once.
        patches: sizes of the tower's input, ascending; empty without a tower.
        regions: how many regions a prompt's chunks see, ascending, doubled each time; empty without regions.
    """

    def __init__(self, config: SlotConfig, sizes: PatchSizes | None, layout: VisualLayout, whole: bool = False):
        """`sizes` is None for a model without a tower; else inputs of the tower are multiples of its window. With
        `whole`, prompts are read at once, however long they are."""
        self.chunk = chunk = min(config.chunk, config.max_length)
        self.lengths = _lengths(config.smallest, chunk, config.max_length)
        if whole:
            self.chunk = self.lengths[-1]
        self.reaches = self.lengths
        if config.max_text is not None:
            require(layout.regions is not None, "max_text", config.max_text, "None: the model keeps no regions")
            self.reaches = _lengths(config.smallest, chunk, config.max_text)
        self.kept = self.reaches[-1] if config.max_kept is None else config.max_kept
        longest = self.lengths[-1]
        self.patches: tuple[int, ...] = ()
        if sizes is not None:
            windows = -(-sizes.merge * sizes.spread * longest // sizes.window)
            self.patches = tuple(n * sizes.window for n in _grown(1, windows))
        self._layout = layout
        most = layout.max_regions
        self.regions = () if layout.regions is None else _doubled(min(16, most), most)

    @property
    def size(self) -> int:
        """Entries per row of the cache, those of regions not counted."""
        return self.reaches[-1]

    def reach(self, length: int) -> int:
        """The least reach that holds so many tokens, with regions: so many of none."""
        return self.reaches[bisect.bisect_left(self.reaches, length)]

    def behind(self, counts: Iterable[tuple[int, ...]], most: int) -> tuple[tuple[int, ...], ...]:
        """For each layer behind which tokens leave the reaches that hold so many tokens, ascending; none is above
        `most`."""
        return tuple(tuple(sorted({min(self.reach(n), self.kept, most) for n in of_layer})) for of_layer in counts)

    def tower(self, patches: int) -> int:
        """The least input of the tower that holds so many patches."""
        return self.patches[bisect.bisect_left(self.patches, patches)]

    def region_reach(self, regions: int) -> RegionReach | None:
        """The least number of regions that holds so many; None without regions."""
        if self._layout.regions is None:
            return None
        most = self.regions[bisect.bisect_left(self.regions, regions)]
        return RegionReach(most, most * self._layout.regions.tokens)

    def chunk_of(self, length: int) -> int:
        """Tokens per row that are read at once of prompts of at most this length: within one chunk, all."""
        return min(self.lengths[bisect.bisect_left(self.lengths, length)], self.chunk)


def _lengths(smallest: int, chunk: int, most: int) -> tuple[int, ...]:
    chunk = min(chunk, most)
    return (*_grown(min(smallest, chunk), chunk), *_doubled(chunk, -(-most // chunk) * chunk)[1:])


def _doubled(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... below `last`, and `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return (*sizes, last)


def _grown(first: int, last: int) -> tuple[int, ...]:
    """first, 1.5 first, 2 first, 3 first, 4 first, ... below `last`, and `last`."""
    sizes = {size for n in _doubled(first, last) for size in (n, n * 3 // 2)}
    return (*sorted(n for n in sizes if n < last), last)
