"""Samples that are left out by their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rave_jax.config import check_fields, check_ranges, require
from rave_jax.data.sample import SampleError

MOST = 2**31 - 1
COUNTED = ("tokens", "patches", "pictures")
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
        check_ranges(self, source=(0, 10**6), most_tokens=(0, MOST), most_patches=(0, MOST), most_pictures=(0, MOST))
        for name, (least, most) in self._limits.items():
            require(0 <= least <= most, f"least_{name}", least, f"a number from 0 to most_{name} {most}")

    @property
    def _limits(self) -> dict[str, tuple[int, int]]:
        return {
            "tokens": (self.least_tokens, self.most_tokens),
            "patches": (self.least_patches, self.most_patches),
            "pictures": (self.least_pictures, self.most_pictures),
        }

    def faults(self, sizes: HasSizes) -> dict[str, Any]:
        """Which samples are outside each limit, by reason."""
        found = {}
        for name, (least, most) in self._limits.items():
            numbers = getattr(sizes, name)
            found[f"under least_{name}"] = np.less(numbers, least)
            found[f"over most_{name}"] = np.greater(numbers, most)
        return found

    def check(self, sizes: HasSizes, name: str) -> None:
        """Raise Filtered, naming the sample, unless it is within all limits."""
        for reason, outside in self.faults(sizes).items():
            if outside:
                limit = reason.split()[1]
                what = limit.split("_")[1]
                number, most = getattr(sizes, what), getattr(self, limit)
                raise Filtered(f"{name}: {number} {what}, {reason.split()[0]} the filter's {limit} {most}", reason)
