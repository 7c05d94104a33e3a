"""Measuring samples: their sizes, and why some of them cannot be used, from texts and headers alone."""

from __future__ import annotations

from typing import NamedTuple

from rave_jax.data.loading import check_answers
from rave_jax.data.processor import Processor, Size
from rave_jax.data.sample import Sample, SampleError, Source

NOTHING = Size(0, 0, 0, 0)


class Measured(NamedTuple):
    """What is known of a sample.

    Fields:
        size: what it takes of a row; nothing where it cannot be used.
        reason: why it cannot be used; empty where it can.
        message: what is wrong with it, with its name.
    """

    size: Size
    reason: str = ""
    message: str = ""


def measure(source: Source, index: int, processor: Processor) -> Measured:
    """Measure a sample as the loader would encode it."""
    try:
        return Measured(size_of(source[index], processor))
    except SampleError as error:
        return Measured(NOTHING, error.reason, str(error))


def size_of(sample: Sample, processor: Processor) -> Size:
    """What a sample takes of a row.

    Raises:
        SampleError: it cannot be used.
    """
    check_answers(sample, sample.called)
    return processor.size(sample.messages, sample.called)
