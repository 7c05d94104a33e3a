"""Batches of a run: any rows of any step, as a pure function of the config and the step.

Nothing is remembered between steps: a process asks for the rows its devices own, a resumed run for the step it stopped
at, and both get what an undisturbed single process would have got. A sample that cannot be used is replaced by the
next one of its source's order that can, which keeps that property.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Generator, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rave_jax.batch import Batch
from rave_jax.config import ConfigError, check_ranges, require
from rave_jax.data.chat import SpecialTokens
from rave_jax.data.collate import BatchShape, check_fits, collate, round_up
from rave_jax.data.layout import check_regions, region_major
from rave_jax.data.order import Order
from rave_jax.data.processor import Processor
from rave_jax.data.sample import EmptyAnswer, Example, Sample, SampleError, Source, message_text
from rave_jax.data.skips import Skip, SkipLog, describe, skip_of
from rave_jax.data.sources import SourceConfig, Synthetic
from rave_jax.layout import VisualLayout

MOST_ROWS, MOST_TOKENS, MOST_PATCHES, MOST_PIXELS = 2**20, 2**22, 2**24, 2**28
"""Far above what is trained anywhere: more is a slip of the keyboard, and would end in want of memory."""
MOST_IN_BATCH = 2**30
"""Tokens, or patches, of a batch over all hosts."""


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum."""

    step: int = 0
    """First step of the stage."""
    weights: tuple[float, ...] = ()
    """Share of each source, in the order of `sources`; empty for equal shares."""
    tokens: int | None = None
    """Tokens of a row in this stage; None for those of `data`. Each size of rows is compiled once."""
    patches: int | None = None
    """Patches of a row in this stage; None for those of `data`."""

    def __post_init__(self) -> None:
        check_ranges(self, step=(0, 2**31 - 1), tokens=(1, MOST_TOKENS), patches=(0, MOST_PATCHES))
        good = all(weight >= 0 for weight in self.weights) and (not self.weights or sum(self.weights) > 0)
        require(good, "weights", self.weights, "numbers of 0 or more, not all 0")


@dataclass(frozen=True)
class DataConfig:
    """The data of a run and the shape of its batches."""

    sources: tuple[SourceConfig, ...] = (Synthetic(),)
    """Where samples come from."""
    stages: tuple[Stage, ...] = (Stage(),)
    """Curriculum: the share of each source, and perhaps the size of rows, from a step on. The first stage starts at
    step 0. Empty for one stage with equal shares."""
    rows: int = 64
    """Rows of a batch over all hosts."""
    tokens: int = 128
    """Tokens of a row, text and visual together."""
    patches: int = 64
    """Patches of a row, rounded up to whole windows of the tower; 0 for text only."""
    documents_per_row: int = 1
    """Samples packed into a row; each may take an equal part of the row's tokens and patches."""
    seed: int = 0
    """Seed of the order of samples, 0 or more."""
    min_pixels: int | None = None
    """Least pixels of a resized picture; None for the model's own limit."""
    max_pixels: int | None = None
    """Most pixels of a resized picture; None for the model's own limit."""
    special_tokens_in_text: SpecialTokens = "text"
    """How a sample's spelling of a special token such as <|im_end|> is read: as "text", or as the token ("tokens")."""
    on_error: Literal["skip", "fail"] = "skip"
    """What to do with a broken picture, an empty answer, a sample over budget: skip and count it, or fail."""
    max_skips: int = 100
    """Consecutive samples that may be skipped for one document of a row; with more, the run stops."""
    prefetch: int = 2
    """Batches prepared ahead in the background; 0 prepares each when it is needed."""
    workers: int = 1
    """Threads that prepare batches."""
    cache_mb: int = 256
    """Memory that keeps processed samples for reuse, in MB; 0 keeps none."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "sources", self.sources, "at least one source, as --data.sources LlavaJson")
        if not self.stages:
            object.__setattr__(self, "stages", (Stage(),))
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        steps = [stage.step for stage in self.stages]
        require(steps[:1] == [0], "stages", steps, "a first stage at step 0")
        require(steps == sorted(set(steps)), "stages", steps, "ascending steps")
        for number, stage in enumerate(self.stages):
            count = len(self.sources)
            expected = (
                f"one weight for each of {count} source{'s' * (count != 1)}; --data.stages [] makes one stage with "
                f"equal shares, --data.stages.{number}.weights sets those of this stage"
            )
            require(len(stage.weights) in (0, count), f"stages.{number}.weights", stage.weights, expected)
        check_ranges(self, rows=(1, MOST_ROWS), tokens=(1, MOST_TOKENS), patches=(0, MOST_PATCHES))
        check_ranges(self, documents_per_row=(1, self.tokens), max_skips=(0, 10**6))
        check_ranges(self, min_pixels=(1, MOST_PIXELS), max_pixels=(1, MOST_PIXELS))
        check_ranges(self, prefetch=(0, 1024), workers=(1, 1024), cache_mb=(0, 10**7))
        for name in ("tokens", "patches"):
            most = max(getattr(part, name) or 0 for part in (self, *self.stages))
            in_batch = f"{name} of a whole batch: rows {self.rows} times {name} {most}"
            require(self.rows * most <= MOST_IN_BATCH, in_batch, self.rows * most, f"at most {MOST_IN_BATCH}")

    def open_sources(self, probe: int = 8) -> tuple[Source, ...]:
        """The sources, each with at least one sample.

        Args:
            probe: first samples of a source of which at least one has to be readable; 0 for none.

        Raises:
            ConfigError: one cannot be opened or is empty, or none of its first samples can be read.
        """
        opened = []
        for number, config in enumerate(self.sources):
            try:
                source: Source = config.build()
            except ConfigError as error:
                raise ConfigError(f"data.sources.{number}: {error}") from error
            require(len(source) > 0, f"data.sources.{number} ({source.name})", len(source), "at least one sample")
            _probe(source, probe, f"data.sources.{number} ({source.name})")
            opened.append(source)
        return tuple(opened)

    def processor(self, directory: str | Path, layout: VisualLayout) -> Processor:
        """The processor of an HF directory, under this config's pixel limits and the layout a model wants."""
        return Processor.from_hf(directory, self.min_pixels, self.max_pixels, layout, self.special_tokens_in_text)


class Pipeline:
    """Batches of a run.

    Args:
        config: what to read.
        processor: the model's processor; `DataConfig.processor` gives it.
        sources: of `DataConfig.open_sources`, where they are open already.

    Raises:
        ConfigError: a source cannot be opened or is empty.
    """

    def __init__(self, config: DataConfig, processor: Processor, sources: Sequence[Source] | None = None):
        self.config = config
        self.processor = processor
        self.sources: tuple[Source, ...] = config.open_sources() if sources is None else tuple(sources)
        most, each = processor.layout.max_regions, config.documents_per_row
        fits = processor.layout.regions is None or each <= most
        require(fits, "data.documents_per_row", each, f"at most max_regions {most}: each document needs a region")
        per_step = config.rows * config.documents_per_row
        equal = (1.0,) * len(self.sources)
        stages = [(stage.step * per_step, stage.weights or equal) for stage in config.stages]
        self._order = Order([len(source) for source in self.sources], stages, config.seed)
        self._cache = _Cache(config.cache_mb * 2**20)
        self.skip_log = SkipLog()
        """Says which samples are not used."""
        self.skipped: Counter[str] = Counter()
        """Samples skipped so far in batches handed out, by reason."""

    def shape(self, step: int) -> BatchShape:
        """Shape of the whole batch of a step, over all hosts."""
        config = self.config
        stage = next(stage for stage in reversed(config.stages) if stage.step <= step)
        tokens = config.tokens if stage.tokens is None else stage.tokens
        patches = config.patches if stage.patches is None else stage.patches
        return BatchShape(config.rows, tokens, round_up(patches, self.processor.settings.window_patches))

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows start..stop-1 of the batch of a step, and no others are loaded.

        Raises:
            SampleError: a sample cannot be used and `on_error` is "fail", or too many in one place cannot.
        """
        batch, skips = self._make(step, start, stop)
        self._count(skips)
        return batch

    def stream(self, step: int, start: int, stop: int) -> Generator[Batch]:
        """The same rows of `step` and all steps after it, made ahead in background threads."""
        if self.config.prefetch == 0:
            while True:
                yield self.rows(step, start, stop)
                step += 1
        # Threads serve: Pillow and the tokenizer let go of the interpreter's lock, and nothing has to be copied between
        # processes. Grain's iterators would add a state of their own to a stream that is already a function of step.
        pool = ThreadPoolExecutor(self.config.workers, thread_name_prefix="data")
        waiting: deque[Future[tuple[Batch, list[Skip]]]] = deque()
        try:
            while True:
                while len(waiting) < max(self.config.prefetch, self.config.workers):
                    waiting.append(pool.submit(self._make, step, start, stop))
                    step += 1
                batch, skips = waiting.popleft().result()
                self._count(skips)
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def samples(self, step: int, row: int) -> list[Sample]:
        """The samples of one row, replacements made, for pictures and tables."""
        per_row = self.config.documents_per_row
        first = (step * self.config.rows + row) * per_row
        found = [self._usable(place) for place in range(first, first + per_row)]
        return [self.sources[number][index] for number, index, _, _ in found]

    def state(self, step: int) -> dict[str, Any]:
        """What to save with a checkpoint before `step` is taken: JSON-ready."""
        return {"step": step, "skipped": dict(self.skipped), **self._facts()}

    def _facts(self) -> dict[str, Any]:
        """What the order of samples hangs on, besides the curriculum."""
        c = self.config
        lengths = [len(source) for source in self.sources]
        facts = {"seed": c.seed, "rows": c.rows, "documents_per_row": c.documents_per_row, "samples": lengths}
        return {**facts, "fingerprints": [source.fingerprint for source in self.sources]}

    def restore(self, state: Mapping[str, Any]) -> int:
        """Take up a saved state; returns the step to go on with.

        Raises:
            ConfigError: the state was saved under another seed, or by a run with another number of rows or samples, or
                with other samples or another order of them: its step would not be where it stopped.
        """
        facts = self._facts()
        found = facts.pop("fingerprints")
        saved = state.get("fingerprints", found)  # states of old runs have none
        for name, value in facts.items():
            if name not in state:
                raise ConfigError(
                    f"the data state of the checkpoint has no entry {name}: it is damaged; delete the checkpoint, "
                    "so that the one before it is taken"
                )
            require(
                state.get(name) == value, f"data.{name}", value, f"{state.get(name)!r} as in the run that was saved"
            )
        for number, source in enumerate(self.sources):
            if found[number] != saved[number]:
                raise ConfigError(
                    f"data.sources.{number} ({source.name}) holds other records than in the run that was saved, or the "
                    f"same in another order (fingerprint {found[number]}, expected {saved[number]}): put the data back "
                    "as it was, or start a new run in another output_dir"
                )
        self.skipped = Counter(state.get("skipped", {}))
        return int(state["step"])

    def _count(self, skips: Sequence[Skip]) -> None:
        self.skipped.update(skip.reason for skip in skips)

    def _make(self, step: int, start: int, stop: int) -> tuple[Batch, list[Skip]]:
        require(0 <= start < stop <= self.config.rows, "rows", (start, stop), f"a range within {self.config.rows} rows")
        per_row = self.config.documents_per_row
        rows: list[list[Example]] = []
        skips: list[Skip] = []
        for row in range(start, stop):
            first = (step * self.config.rows + row) * per_row
            found = [self._usable(place) for place in range(first, first + per_row)]
            rows.append([example for _, _, example, _ in found])
            skips += [skip for _, _, _, skipped in found for skip in skipped]
        settings = self.processor.settings
        shape = self.shape(step)._replace(rows=stop - start)
        return collate(rows, shape, settings.patch_numbers, settings.merge_patches), skips

    def _usable(self, place: int) -> tuple[int, int, Example, list[Skip]]:
        """Source, index and example of a place: its sample, or the first behind it in the order that can be used."""
        number, draw = self._order.draw(place)
        shape = self.shape(place // (self.config.rows * self.config.documents_per_row))
        skips: list[Skip] = []
        for attempt in range(self.config.max_skips + 1):
            index = self._order.index(number, draw + attempt)
            try:
                return number, index, self._load(number, index, shape), skips
            except SampleError as error:
                if self.config.on_error == "fail":
                    raise
                skips.append(skip_of(self.sources[number].name, index, error))
                self.skip_log.add(skips[-1])
        raise SampleError(
            f"{self.sources[number].name}: {self.config.max_skips + 1} consecutive samples cannot be used: "
            f"{describe(skips)}; the last: {skips[-1].message}"
        )

    def _load(self, number: int, index: int, shape: BatchShape) -> Example:
        key = (number, index, shape)  # what fits the rows of one stage need not fit another's
        if (cached := self._cache.get(key)) is not None:
            return cached
        sample = self.sources[number][index]
        name = sample.called
        check_answers(sample, name)
        per_row = self.config.documents_per_row
        example = self.processor.encode(sample.messages, name=name, most_tokens=shape.tokens // per_row)
        check_fits(example, shape.tokens // per_row, shape.patches // per_row, name)
        if self.processor.layout.regions is not None:
            check_regions(example, self.processor.layout.max_regions // per_row, name)
            example = region_major(example)
        self._cache.put(key, example)
        return example


def _probe(source: Source, most: int, field: str) -> None:
    """Raise ConfigError where none of the first samples can be read: then the file is not of this kind."""
    errors: list[SampleError] = []
    for index in range(min(most, len(source))):
        try:
            source[index]
            return
        except SampleError as error:
            errors.append(error)
    if errors:
        raise ConfigError(f"{field}: none of its first {len(errors)} samples can be read; the first: {errors[0]}")


def check_answers(sample: Sample, name: str) -> None:
    """Raise EmptyAnswer, naming the sample, unless it ends with an answer, no answer is blank and one is learned."""
    if not sample.messages or sample.messages[-1]["role"] != "assistant":
        raise EmptyAnswer(f"{name}: the conversation ends without an answer{_files_of(sample)}")
    answers = [message for message in sample.messages if message["role"] == "assistant"]
    if not all(message_text(message).strip() for message in answers):
        raise EmptyAnswer(f"{name}: an answer is empty{_files_of(sample)}")
    if not any(message.get("weight", 1) for message in answers):
        raise EmptyAnswer(f"{name}: every answer has the weight 0{_files_of(sample)}")


def _files_of(sample: Sample) -> str:
    files = [image for image in sample.images if isinstance(image, str)]
    return f" ({', '.join(files)})" if files else ""


class _Cache:
    """Examples already made, the least recently used thrown out first."""

    def __init__(self, limit: int):
        self._limit = limit
        self._used = 0
        self._items: OrderedDict[Hashable, tuple[Example, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Example | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: Hashable, example: Example) -> None:
        codes = (len(example.info) + 6) * 4 * len(example.tokens)
        size = example.patches.nbytes + 16 * len(example.patches) + codes
        if size > self._limit:
            return
        with self._lock:
            if key in self._items:
                return
            self._items[key] = (example, size)
            self._used += size
            while self._used > self._limit:
                _, (_, dropped) = self._items.popitem(last=False)
                self._used -= dropped
