"""Samples that are left out by their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rave_jax.config import check_fields, check_ranges, require
from rave_jax.data.sample import SampleError

MOST = 2**31 - 1
COUNTED = ("tokens", "patches", "pictures")
SIDES = ("least", "most")
LIMITS = frozenset(f"{side}_{name}" for name in COUNTED for side in ("under least", "over most"))
"""Reasons under which samples outside a filter are counted."""


class Filtered(SampleError):
    """A sample that a filter of the config leaves out."""

    def __init__(self, message: str, reason: str = "filtered"):
        """`reason` names the limit that it is under or over."""
        super().__init__(message)
        self.reason = reason


class HasSizes(Protocol):
    """Numbers of one sample, or arrays of those of many."""

    @property
    def tokens(self) -> Any: ...

    @property
    def patches(self) -> Any: ...

    @property
    def pictures(self) -> Any: ...


@dataclass(frozen=True)
class SizeFilter:
    """Samples of sizes between these limits are used; others are left out, and counted under the limit's name."""

    source: int | None = None
    """Number of the source whose samples it is for, from 0; None for all."""
    least_tokens: int = 0
    """Least tokens, text and visual together."""
    most_tokens: int = MOST
    """Most tokens."""
    least_patches: int = 0
    """Least patches."""
    most_patches: int = MOST
    """Most patches."""
    least_pictures: int = 0
    """Least pictures and videos."""
    most_pictures: int = MOST
    """Most pictures and videos."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_ranges(self, source=(0, 10**6), **{f"{side}_{name}": (0, MOST) for side in SIDES for name in COUNTED})
        for name, least, most in self._limits():
            require(least <= most, f"least_{name}", least, f"a number from 0 to most_{name} {most}")

    def _limits(self) -> tuple[tuple[str, int, int], ...]:
        """(what, least, most) of each thing that is counted."""
        return (
            ("tokens", self.least_tokens, self.most_tokens),
            ("patches", self.least_patches, self.most_patches),
            ("pictures", self.least_pictures, self.most_pictures),
        )

    def faults(self, sizes: HasSizes) -> dict[str, Any]:
        """Which samples are outside each limit, by reason."""
        found = {}
        for name, least, most in self._limits():
            found[f"under least_{name}"] = np.less(getattr(sizes, name), least)
            found[f"over most_{name}"] = np.greater(getattr(sizes, name), most)
        return found

    def check(self, sizes: HasSizes, name: str) -> None:
        """Raise Filtered, naming the sample, unless it is within all limits."""
        for what, least, most in self._limits():
            number = getattr(sizes, what)
            if number < least:
                raise Filtered(
                    f"{name}: {number} {what}, under the filter's least_{what} {least}", f"under least_{what}"
                )
            if number > most:
                message = f"{name}: {number} {what}, over the filter's most_{what} {most}"
                raise Filtered(message, f"over most_{what}")
