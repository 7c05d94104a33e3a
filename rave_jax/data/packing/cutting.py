"""Conversations that no row holds, cut behind an answer."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from rave_jax.data.loading import cut_to
from rave_jax.data.packing.measuring import size_of
from rave_jax.data.packing.sizes import Room
from rave_jax.data.processor import Processor, Size
from rave_jax.data.sample import Sample, SampleError


class Cut(NamedTuple):
    """The part of a conversation that is kept.

    Fields:
        messages: how many, from the first on.
        size: what they take of a row.
    """

    messages: int
    size: Size


def longest_cut(sample: Sample, processor: Processor, room: Room) -> Cut | None:
    """The most messages that end with an answer, that a row holds and that leave something to learn; None: there are
    none. A picture stays with its message, so it is kept whole or not at all.

    Each cut is measured as what it becomes, not as a part of the whole: a template may write earlier answers without
    their thoughts, and a family may cut pictures otherwise where there are fewer.
    """
    for messages in range(len(sample.messages) - 1, 0, -1):
        if sample.messages[messages - 1]["role"] != "assistant":
            continue
        with contextlib.suppress(SampleError):
            size = size_of(cut_to(sample, messages), processor)
            fits = size.tokens <= room.tokens and size.patches <= room.patches and size.regions <= room.regions
            if fits:
                return Cut(messages, size)
    return None
