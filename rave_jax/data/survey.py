"""What samples need: tokens and patches, counted from their texts and the headers of pictures; no pixel is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rave_jax.data.loading import check_answers
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Message, SampleError, Source
from rave_jax.data.skips import Skip, skip_of
from rave_jax.typing import Int, NpArray


class Need(NamedTuple):
    """Tokens and patches of a conversation, or budgets of a row."""

    tokens: int
    patches: int


@dataclass(frozen=True)
class Survey:
    """What samples of one source need.

    Attributes:
        name: of the source.
        length: samples of the source.
        tokens, patches: of each sample that was read.
        skips: those that cannot be used whatever the budgets are. Broken pixels are not among them: only headers are
            read.
    """

    name: str
    length: int
    tokens: Int[NpArray, "N"]
    patches: Int[NpArray, "N"]
    skips: tuple[Skip, ...]

    def percentile(self, percent: float) -> Need:
        """The tokens that so many percent of the samples get by with, and the patches."""
        if not len(self.tokens):
            return Need(0, 0)
        tokens, patches = (np.percentile(n, percent, method="inverted_cdf") for n in (self.tokens, self.patches))
        return Need(int(tokens), int(patches))

    def share(self, budget: Need) -> float:
        """Share of the samples that fit a budget, 0 to 1; 1 where there are none."""
        fits = (self.tokens <= budget.tokens) & (self.patches <= budget.patches)
        return float(fits.mean()) if len(fits) else 1.0


def survey(source: Source, processor: Processor, samples: int = 1000) -> Survey:
    """Measure at most so many samples of a source, spread evenly over it."""
    length = len(source)
    indices = np.unique(np.linspace(0, length - 1, min(samples, length)).astype(np.int64))
    needs: list[Need] = []
    skips: list[Skip] = []
    for index in map(int, indices):
        try:
            sample = source[index]
            check_answers(sample, sample.called)
            needs.append(measure(processor, sample.messages))
        except SampleError as error:
            skips.append(skip_of(source.name, index, error))
    tokens, patches = np.array(needs, np.int64).reshape(-1, 2).T
    return Survey(source.name, length, tokens, patches, tuple(skips))


def measure(processor: Processor, messages: Sequence[Message]) -> Need:
    """Tokens and patches that `processor.encode` makes of a conversation.

    Raises:
        SampleError: a message or the header of a picture that cannot be used.
    """
    found = processor.size(messages)
    return Need(found.tokens, found.patches)
