"""Sizes of resized pictures and frames."""

from __future__ import annotations

LONGEST = 4096
"""Most pixels of the longer side, whatever is asked."""


def longer_side(height: int, width: int, most: int) -> tuple[int, int]:
    """Size with a longer side of `most` and the same aspect; the shorter one is made even."""
    if width >= height:
        shorter = int(most / (width / height))
        return max(shorter + shorter % 2, 1), most
    shorter = int(most * (width / height))
    return most, max(shorter + shorter % 2, 1)


def bounded(height: int, width: int, most: int) -> tuple[int, int]:
    """Size whose longer side is at most `most`, with the same aspect."""
    if max(height, width) <= most:
        return height, width
    if width >= height:
        return max(int(most / (width / height)), 1), most
    return most, max(int(most * (width / height)), 1)
