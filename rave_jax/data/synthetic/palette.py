"""The named colours of the synthetic pictures."""

from __future__ import annotations

NAMES = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", "brown", "gray")
# Light enough that black ink reads on every one of them, and far apart from each other.
RGB = (
    (232, 60, 52),
    (62, 176, 78),
    (72, 128, 244),
    (250, 222, 60),
    (252, 142, 32),
    (164, 84, 214),
    (250, 156, 200),
    (72, 214, 232),
    (156, 98, 56),
    (168, 168, 168),
)
PAPER = (252, 251, 248)
INK = (18, 18, 24)
