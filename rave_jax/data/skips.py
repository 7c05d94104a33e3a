"""Samples that were not used: counted by reason, one example of each said at once, the rest in a summary."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rave_jax.data.sample import OverBudget, SampleError

log = logging.getLogger(__name__)

SUMMARIES = tuple(10**n for n in range(1, 10))
"""Numbers of samples at which a summary is said."""


@dataclass(frozen=True)
class Skip:
    """A sample that was not used: of which source, which index, why, and what was wrong."""

    source: str
    index: int
    reason: str
    message: str
    tokens: int = 0
    """Tokens it needs, where it was over budget."""
    patches: int = 0
    """Patches it needs, where it was over budget."""


def skip_of(source: str, index: int, error: SampleError) -> Skip:
    """The skip of a sample for an error."""
    over = isinstance(error, OverBudget)
    tokens, patches = (error.tokens, error.patches) if over else (0, 0)
    return Skip(source, index, error.reason, str(error), tokens, patches)


class _Group(NamedTuple):
    """Skips of one source for one reason: how many, the first one, the most they need."""

    count: int
    first: Skip
    tokens: int
    patches: int


class SkipLog:
    """Says of each source and reason one example when it first comes up, and a summary at the 10th, 100th, 1000th ...

    A sample counts once, however often it comes up. All of them are logged at the level INFO.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, int]] = set()
        self._groups: dict[tuple[str, str], _Group] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[SkipLog], tuple[()]]:
        return SkipLog, ()  # another process says nothing

    def add(self, skip: Skip) -> None:
        """Take up a skip, and say what is to be said of it."""
        with self._lock:
            if (skip.source, skip.index) in self._seen:
                return
            self._seen.add((skip.source, skip.index))
            key = (skip.source, skip.reason)
            before = self._groups.get(key, _Group(0, skip, 0, 0))
            tokens, patches = max(before.tokens, skip.tokens), max(before.patches, skip.patches)
            self._groups[key] = _Group(before.count + 1, before.first, tokens, patches)
            summary = self.summary() if len(self._seen) in SUMMARIES else ""
        if before.count == 0:
            log.warning("skipped (%s) %s; further samples of this kind are only counted", skip.reason, skip.message)
        else:
            log.info("skipped (%s) %s", skip.reason, skip.message)
        if summary:
            log.warning("%s", summary)

    def close(self) -> None:
        """Say the summary of a run that is over, where there is more to say than was said of each."""
        if len(self._seen) > len(self._groups):
            log.warning("%s", self.summary())

    def summary(self) -> str:
        """One line: how many samples were skipped for which reason, with an example of each; "" where none was."""
        if not self._groups:
            return ""
        parts = [
            f"{group.count} {reason} in {source}{_need(group)}, such as {shortened(group.first.message)}"
            for (source, reason), group in sorted(self._groups.items(), key=lambda item: -item[1].count)
        ]
        return f"skipped {len(self._seen)} samples so far: {'; '.join(parts)}"


def describe(skips: Sequence[Skip]) -> str:
    """Skips in a few words: counts by reason, and what those over budget need."""
    parts = []
    for reason, count in Counter(skip.reason for skip in skips).most_common():
        found = [skip for skip in skips if skip.reason == reason]
        most = _Group(count, found[0], max(s.tokens for s in found), max(s.patches for s in found))
        parts.append(f"{count} {reason}{_need(most)}")
    return ", ".join(parts)


def shortened(text: str, most: int = 200) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _need(group: _Group) -> str:
    if not group.tokens:
        return ""
    most = f"up to {group.tokens} tokens and {group.patches} patches"
    return f" (they need {most}; `rave-jax data CONFIG` says what all of the data needs)"
