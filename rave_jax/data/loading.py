"""The sample of a planned document, encoded, or why it cannot be used."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from rave_jax.data.collate import check_fits
from rave_jax.data.config import DataConfig
from rave_jax.data.layout import check_regions, region_major
from rave_jax.data.plan import PlannedDocument
from rave_jax.data.processor import Processor, Size
from rave_jax.data.sample import EmptyAnswer, Example, Sample, SampleError, Source, message_text
from rave_jax.data.skips import Skip, skip_of
from rave_jax.data.weighting import weighted


class Loader:
    """Loads the documents of a plan, each from its own sample alone. Use it from any thread; it can be pickled."""

    def __init__(self, config: DataConfig, sources: Sequence[Source], processor: Processor):
        """
        Args:
            config: says what becomes of samples that cannot be used, and how much memory keeps examples.
            sources: where samples come from.
            processor: encodes samples.
        """
        self._sources, self._processor = tuple(sources), processor
        self._skip, self._filters, self._weighting = config.on_error == "skip", config.filters, config.weighting
        self._cache = _Cache(config.cache_mb * 2**20)

    def load(self, document: PlannedDocument) -> Example | Skip:
        """The sample of a document, encoded; or why it cannot be used, which leaves its place in the row empty.

        No other sample takes its place: each comes once in an epoch.

        Raises:
            SampleError: the sample cannot be used and `on_error` is "fail".
        """
        try:
            return self._example(document)
        except SampleError as error:
            if not self._skip:
                raise
            return skip_of(self._sources[document.source].name, document.index, error)

    def sample(self, document: PlannedDocument) -> Sample:
        """The sample of a document, with the part of its conversation that is used.

        Raises:
            SampleError: its record cannot be used.
        """
        sample = self._sources[document.source][document.index]
        return sample if document.messages is None else cut_to(sample, document.messages)

    def _example(self, document: PlannedDocument) -> Example:
        # What fits one budget need not fit another.
        if (cached := self._cache.get(document)) is not None:
            return cached
        sample, budget = self.sample(document), document.budget
        name = sample.called
        check_answers(sample, name)
        example = self._processor.encode(sample.messages, name=name, most_tokens=budget.tokens)
        check_fits(example, budget.tokens, budget.patches, name)
        if self._processor.layout.regions is not None:
            check_regions(example, budget.regions, name)
        self._check_filters(document.source, sample, example)
        example = example._replace(loss_mask=weighted(example.loss_mask, self._weighting))
        if self._processor.layout.regions is not None:
            example = region_major(example)
        self._cache.put(document, example)
        return example

    def _check_filters(self, source: int, sample: Sample, example: Example) -> None:
        for each in self._filters:
            if each.source in (None, source):
                size = Size(len(example.tokens), example.patches.length, 0, count_visuals(sample))
                each.check(size, sample.called)


def cut_to(sample: Sample, messages: int) -> Sample:
    """The sample with so many messages of its conversation. `answers` stay those of the whole."""
    return dataclasses.replace(sample, messages=sample.messages[:messages])


def count_visuals(sample: Sample) -> int:
    """Pictures and videos of a sample."""
    parts = (part for m in sample.messages if not isinstance(m["content"], str) for part in m["content"])
    return sum(part["type"] != "text" for part in parts)


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

    def __reduce__(self) -> tuple[type[_Cache], tuple[int]]:
        return _Cache, (self._limit,)  # empty: another process makes its own examples

    def get(self, key: Hashable) -> Example | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: Hashable, example: Example) -> None:
        codes = (len(example.info) + 6) * 4 * len(example.tokens)
        size = sum(array.nbytes for array in example.patches) + codes
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
