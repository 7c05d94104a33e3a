"""The config of packing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rave_jax.config import check_fields, check_ranges

MOST_DOCUMENTS, MOST_LOOKAHEAD = 2**16, 2**12


@dataclass(frozen=True)
class Packing:
    """Rows of as many samples of any size as fit, chosen by their sizes."""

    documents: int = 256
    """The most samples in a row. With 1, samples stand one to a row, in the order in which they are drawn."""
    lookahead: int = 8
    """Steps that are planned together: more fill rows better, and leave samples longer away from where they were
    drawn."""
    long: Literal["skip", "cut"] = "skip"
    """What becomes of a conversation that no row holds: it is skipped, or cut behind the last answer that fits."""
    whole_epochs: bool = True
    """Does a row or step never have samples of two epochs? The last step of each epoch is then filled up with padding,
    so data of few steps wants False. It says nothing where sources do not end their epochs together."""
    workers: int = 4
    """Threads that measure samples ahead."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_ranges(self, documents=(1, MOST_DOCUMENTS), lookahead=(1, MOST_LOOKAHEAD), workers=(1, 1024))
