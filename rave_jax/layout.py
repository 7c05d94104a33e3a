"""How the tokens of a picture are laid out: regions that attention may choose between, and context tokens behind them.

A model's mechanisms say it (`ModelOptions.layout`), `data` carries it out, and both read these configs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rave_jax.config import check_fields, require
from rave_jax.typing import Int, NpArray

MAX_SIDE = 1 << 20
"""Most tokens along a side of a region, or in one: more than any row holds."""
MAX_CONTEXT = 1 << 14
"""Most context tokens behind a picture or frame: more than a picture has tokens."""
Grid = tuple[int, int, int]
"""Frames, rows and columns of a merged grid."""
Box = tuple[float, float, float, float]
"""x1, y1, x2, y2; far edges excluded."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
"""All of a picture, in fractions of its width and height."""


class Shown(NamedTuple):
    """What the visual tokens of one grid show.

    Fields:
        picture: number of the picture or video in the conversation, from 1.
        box: the part of it that their grid stands for, in fractions of its width and height. It reaches beyond the
            picture where that has a border or ends of lines. None: no part of it, as of a class token.
    """

    picture: int
    box: Box | None


def inside(part: Box, box: Box) -> Box:
    """A box that is given in fractions of a part of a picture, in fractions of the picture."""
    width, height = part[2] - part[0], part[3] - part[1]
    return part[0] + box[0] * width, part[1] + box[1] * height, part[0] + box[2] * width, part[1] + box[3] * height


def seen_from(part: Box, box: Box) -> Box:
    """A box that is given in fractions of a picture, in fractions of a part of it: the inverse of `inside`."""
    width, height = part[2] - part[0], part[3] - part[1]
    x1, y1, x2, y2 = box
    return (x1 - part[0]) / width, (y1 - part[1]) / height, (x2 - part[0]) / width, (y2 - part[1]) / height


@dataclass(frozen=True)
class FixedRegions:
    """Regions of one size. Those at the far edges of a grid that it does not divide are smaller."""

    height: int = 6
    """Rows of a region."""
    width: int = 6
    """Columns of a region."""
    frames: int = 1
    """Frames of a region."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("height", "width", "frames"):
            require(1 <= getattr(self, name) <= MAX_SIDE, name, getattr(self, name), f"a number from 1 to {MAX_SIDE:,}")

    @property
    def tokens(self) -> int:
        """m: the most tokens in a region."""
        return self.height * self.width * self.frames

    def shape(self, grid: Grid) -> Grid:
        """Regions of a grid along its frames, rows and columns."""
        t, h, w = grid
        return -(-t // self.frames), -(-h // self.height), -(-w // self.width)

    def coordinates(self, places: tuple[Int[NpArray, "N"], ...], grid: Grid) -> tuple[Int[NpArray, "N"], ...]:
        """Which region, along frames, rows and columns, each place (frame, row, column) is in."""
        frame, row, col = places
        return frame // self.frames, row // self.height, col // self.width

    def largest(self, grid: Grid) -> int:
        """Tokens of the largest region of a grid."""
        t, h, w = grid
        return min(t, self.frames) * min(h, self.height) * min(w, self.width)

    def most_beside(self, layout: VisualLayout) -> int:
        """The most such regions of a row that has no more than the regions of this layout."""
        regions = layout.regions
        assert regions is not None
        if not isinstance(regions, FixedRegions):
            return layout.max_regions * regions.tokens
        cut = -(-regions.frames // self.frames), -(-regions.height // self.height), -(-regions.width // self.width)
        return layout.max_regions * math.prod(cut)


@dataclass(frozen=True)
class AdaptiveRegions:
    """The same number of regions in each picture; fewer where its grid has fewer rows or columns."""

    rows: int = 4
    """Regions along the height of a picture."""
    cols: int = 4
    """Regions along its width."""
    frames: int = 1
    """Frames of a region."""
    tokens: int = 144
    """Most tokens in a region (m); a picture with larger regions is over budget."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("rows", "cols", "frames", "tokens"):
            require(1 <= getattr(self, name) <= MAX_SIDE, name, getattr(self, name), f"a number from 1 to {MAX_SIDE:,}")

    def shape(self, grid: Grid) -> Grid:
        """Regions of a grid along its frames, rows and columns."""
        t, h, w = grid
        return -(-t // self.frames), min(self.rows, h), min(self.cols, w)

    def coordinates(self, places: tuple[Int[NpArray, "N"], ...], grid: Grid) -> tuple[Int[NpArray, "N"], ...]:
        """Which region, along frames, rows and columns, each place (frame, row, column) is in. No region is empty, and
        the sizes along an axis differ by at most one."""
        frame, row, col = places
        _, down, across = self.shape(grid)
        return frame // self.frames, row * down // grid[1], col * across // grid[2]

    def largest(self, grid: Grid) -> int:
        """Tokens of the largest region of a grid."""
        _, down, across = self.shape(grid)
        return min(grid[0], self.frames) * -(-grid[1] // down) * -(-grid[2] // across)


Regions = FixedRegions | AdaptiveRegions


@dataclass(frozen=True)
class ContextTokens:
    """Learnable tokens behind each picture or frame that see it alone and are seen by all that follows.

    Source: Gaze Attention (arXiv 2605.13080), as its authors describe it; positions and start are ours.
    """

    count: int = 4
    """Tokens behind each picture or frame."""
    per: Literal["frame", "image"] = "frame"
    """Where they stand: behind each frame of a video, or once behind the whole video. A picture has one frame."""
    sees: Literal["own", "own+first"] = "own"
    """What they see: their own picture or frame, or also the first token of the document."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.count <= MAX_CONTEXT, "count", self.count, f"a number from 1 to {MAX_CONTEXT:,}")

    def tokens(self, grid: Grid) -> int:
        """Context tokens of a whole grid."""
        return self.count * (grid[0] if self.per == "frame" else 1)


@dataclass(frozen=True)
class VisualLayout:
    """How one model's visual tokens are laid out; the default has no regions and no context tokens."""

    regions: Regions | None = None
    """Which tokens form a region, or None where no mechanism asks for regions."""
    max_regions: int = 0
    """R: the most regions of a row."""
    context: ContextTokens | None = None
    """Tokens behind each picture or frame, or None."""

    def count_regions(self, grid: Grid) -> int:
        """Regions of a grid; 0 without regions."""
        return 0 if self.regions is None else math.prod(self.regions.shape(grid))

    def extra_tokens(self, grid: Grid) -> int:
        """Context tokens of a grid; 0 without them."""
        return 0 if self.context is None else self.context.tokens(grid)
