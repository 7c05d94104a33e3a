"""The index of sizes: what every sample of a run takes of a row, measured once and kept beside the data."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rave_jax.config import to_json
from rave_jax.data.beside import folder_beside
from rave_jax.data.packing.kept import BLOCK, COLUMNS, block_path, read_block, write_block
from rave_jax.data.packing.measuring import Measured, measure
from rave_jax.data.packing.shared import SharedTables
from rave_jax.data.packing.sizes import Sizes
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Part, Source
from rave_jax.typing import Int, NpArray

log = logging.getLogger(__name__)

VERSION = 1
"""Of how samples are measured: another one measures anew."""
UNMEASURED, USABLE, FIRST_REASON = 0, 1, 2
"""What is known of a sample: nothing, that it can be used, or from `FIRST_REASON` on why it cannot."""
REASONS = ("bad record", "unread key", "broken image", "broken video", "empty answer", "over budget")
"""Why samples cannot be used; a reason that is not here counts as the first one."""
CHUNK = 64
"""Samples that a thread measures in one go."""
EVERY, SHARE = 20.0, 20
"""Seconds between two times that the index is written, and how many times longer than writing takes."""

Progress = Callable[[int, int], None]
"""Told of (samples measured, samples to measure) while somebody waits for them."""


class Known(NamedTuple):
    """What is known of samples.

    Fields:
        sizes: of each sample; 0 where it cannot be used.
        status: of each: `USABLE`, or `FIRST_REASON` and on.
    """

    sizes: Sizes
    status: Int[NpArray, "N"]


class SizeIndex:
    """Sizes of the samples of a run, in flat arrays of 17 bytes a sample. Use it from any thread.

    What is asked for is measured, in threads, unless it is known from an earlier run. Values depend on samples and
    settings alone, so all processes of a job have the same ones, whoever measured them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        configs: Sequence[Any],
        processor: Processor,
        workers: int = 1,
        writes: bool = True,
    ):
        """
        Args:
            sources: of a run.
            configs: of each source: sizes are kept for these settings.
            processor: of the run.
            workers: threads that measure.
            writes: is what was measured kept beside the data? One process of a job is enough.
        """
        self._sources, self._processor = tuple(sources), processor
        self._tables = [
            _Table(source, f"{VERSION} {processor.fingerprint} {to_json(config)}", writes)
            for source, config in zip(sources, configs, strict=True)
        ]
        self._workers = workers
        self.progress: Progress | None = None
        """Told how far measuring is while `known` waits for it."""
        self._start()
        for table in self._tables:
            table.read()

    def _start(self) -> None:
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="sizes")
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._running: dict[tuple[int, int], Future[None]] = {}
        self._written, self._pause = time.monotonic(), EVERY
        self.measured = 0
        """Samples that this process measured."""

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_sources", "_processor", "_tables", "_workers")
        return {name: getattr(self, name) for name in kept} | {"progress": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def reason(self, status: int) -> str:
        """Why samples of a status cannot be used."""
        return REASONS[status - FIRST_REASON]

    def known(self, sources: Int[NpArray, "N"], indices: Int[NpArray, "N"]) -> Known:
        """What is known of these samples, measured if need be: waits for it."""
        waiting = self._ask(sources, indices)
        for done, future in enumerate(waiting, start=1):
            future.result()
            if self.progress is not None:
                self.progress(min(done * CHUNK, len(indices)), len(indices))
        columns = np.zeros((COLUMNS, len(indices)), np.int32)
        status = np.zeros(len(indices), np.uint8)
        for number, table in enumerate(self._tables):
            mine = np.flatnonzero(sources == number)
            columns[:, mine] = table.sizes[:, indices[mine]]
            status[mine] = table.status[indices[mine]]
        self._write_if_due()
        return Known(Sizes(*columns), status)

    def ahead(self, sources: Int[NpArray, "N"], indices: Int[NpArray, "N"]) -> None:
        """Begin to measure samples that will be asked for later."""
        self._ask(sources, indices)

    def what_is_wrong(self, source: int, index: int) -> Measured:
        """A sample that cannot be used, measured again to say what is wrong with it."""
        return measure(self._sources[source], index, self._processor)

    def close(self) -> None:
        """Stop measuring and keep what was measured."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.write()

    def write(self) -> None:
        """Keep what was measured since the last time."""
        with self._writing:
            began = time.monotonic()
            for table in self._tables:
                table.write()
            self._written = time.monotonic()
            self._pause = max(EVERY, SHARE * (self._written - began))

    def _ask(self, sources: Int[NpArray, "N"], indices: Int[NpArray, "N"]) -> list[Future[None]]:
        """Have these samples measured that are not; what runs already is not begun again."""
        futures: dict[int, Future[None]] = {}
        with self._lock:
            for number, table in enumerate(self._tables):
                mine = np.unique(indices[sources == number])
                fresh: list[int] = []
                for index in mine[table.status[mine] == UNMEASURED].tolist():
                    running = self._running.get((number, index))
                    if running is None:
                        fresh.append(index)
                    else:
                        futures[id(running)] = running
                # Each process of a host begins elsewhere: they see what the others have measured.
                turn = os.getpid() * CHUNK % max(len(fresh), 1)
                fresh = [*fresh[turn:], *fresh[:turn]]
                for first in range(0, len(fresh), CHUNK):
                    part = fresh[first : first + CHUNK]
                    future = self._pool.submit(self._measure, number, part)
                    self._running.update(((number, index), future) for index in part)
                    futures[id(future)] = future
        return list(futures.values())

    def _measure(self, number: int, indices: list[int]) -> None:
        table = self._tables[number]
        try:
            for index in indices:
                if table.status[index] == UNMEASURED:
                    table.put(index, measure(self._sources[number], index, self._processor))
        finally:
            with self._lock:
                for index in indices:
                    self._running.pop((number, index), None)
                self.measured += len(indices)
        self._write_if_due()

    def _write_if_due(self) -> None:
        with self._lock:
            due = time.monotonic() - self._written > self._pause
            if due:
                self._written = time.monotonic()
        if due:
            self.write()


class _Table:
    """Sizes of the samples of one source."""

    def __init__(self, source: Source, settings: str, writes: bool):
        length = len(source)
        self._memory = SharedTables(length)
        self.sizes, self.status = self._memory.tables()
        self._settings = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()
        self._writes, self._name = writes, source.name
        self._blocks = [
            _Block(begin + first, min(begin + part.length, begin + first + BLOCK), part, first // BLOCK)
            for begin, part in _begins(source.parts)
            for first in range(0, part.length, BLOCK)
        ]
        self._kept = np.zeros(len(self._blocks), np.int64)
        """Samples of each block that were measured when it was last read or written."""
        self._folders: dict[str, Path | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process of this host reads and writes the same memory, and keeps nothing beside the data.
        return self.__dict__ | {"sizes": None, "status": None, "_writes": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.sizes, self.status = self._memory.tables()

    def read(self) -> None:
        """Take up what is kept beside the data."""
        for number, block in enumerate(self._blocks):
            path = self._path(block)
            found = None if path is None else read_block(path, block.stop - block.first, self._settings)
            if found is not None:
                self.sizes[:, block.first : block.stop], self.status[block.first : block.stop] = found
                self._kept[number] = np.count_nonzero(found[1])

    def put(self, index: int, measured: Measured) -> None:
        """Take up a sample that was measured."""
        self.sizes[:, index] = measured.size
        place = REASONS.index(measured.reason) if measured.reason in REASONS else 0
        self.status[index] = FIRST_REASON + place if measured.reason else USABLE  # last: then the sizes are there

    def write(self) -> None:
        """Keep the blocks of which more is known, whichever process of the host measured it."""
        if not self._writes:
            return
        for number, block in enumerate(self._blocks):
            span = slice(block.first, block.stop)
            status = self.status[span].copy()  # before the sizes: others may put samples meanwhile
            measured = np.count_nonzero(status)
            path = None if measured == self._kept[number] else self._path(block)
            if path is None:
                continue
            try:
                write_block(path, self.sizes[:, span], status, self._settings)
            except OSError as error:
                log.warning(
                    "warning: sizes of the samples of %s cannot be kept in %s: %s; the next run measures them again",
                    self._name,
                    path.parent,
                    error.strerror or error,
                )
                self._writes = False
                return
            self._kept[number] = measured

    def _path(self, block: _Block) -> Path | None:
        """The file of a block; None where nothing can be kept."""
        data = block.part.data
        if not data:
            return None
        if data not in self._folders:
            try:
                self._folders[data] = folder_beside(data)
            except OSError:
                self._folders[data] = None
        folder = self._folders[data]
        return None if folder is None else block_path(folder, self._settings, block.part.fingerprint, block.number)


class _Block(NamedTuple):
    """Samples first..stop-1 of a source, block `number` of a part."""

    first: int
    stop: int
    part: Part
    number: int


def _begins(parts: Sequence[Part]) -> list[tuple[int, Part]]:
    """Each part with the index of its first sample."""
    begins = np.cumsum([0, *(part.length for part in parts)]).tolist()
    return list(zip(begins, parts, strict=False))
