"""Pictures of any resolution: into how many tiles one is cut, and which units of the tiles its visual tokens are.

The rules are those of transformers' `LlavaOnevisionImageProcessor` and `LlavaOnevisionModel` (5.23.0):

- Of the sizes that a picture may be fitted into, the one is taken in which most of its own pixels are kept, and of
  several, the one with the fewest pixels to spare. The picture is resized to fit, keeping its sides' ratio, and stands
  in the middle of black.
- Visual tokens are first those of the whole picture, stretched to one tile. Those of the tiles follow, read as one
  grid, without the rows or columns that see black alone. A grid of more than 1.21 times `most_tiles` tiles is
  interpolated bilinearly to about as many. Each of its rows ends with the learned row.
- A picture among several is one tile, and of a video each frame, interpolated to half its sides; behind either the
  learned row stands once.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from rave_jax.layout import Box
from rave_jax.typing import NpArray

NEWLINE = -1
RATIO = 1.1
"""Above it a grid is interpolated."""


class Tiled(NamedTuple):
    """How a picture is cut.

    Fields:
        rows, cols: of tiles; 0 of a picture that is one tile alone.
        height, width: in units, of the part of the tiles' grid that sees the picture.
        kept: height and width of what that is interpolated to.
    """

    rows: int = 0
    cols: int = 0
    height: int = 0
    width: int = 0
    kept: tuple[int, int] = (0, 0)


ONE_TILE = Tiled()


class Mixes(NamedTuple):
    """Arrays of `Patches.source` and `Patches.weight`, [M,4]."""

    source: Any
    weight: Any


def best_size(height: int, width: int, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Which of the sizes a picture is fitted into."""
    best, most, least = sizes[0], 0, math.inf
    for rows, cols in sizes:
        scale = min(cols / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        spare = rows * cols - kept
        if kept > most or (kept == most and spare < least):
            best, most, least = (rows, cols), kept, spare
    return best


def fitted(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture that is resized to fit into a size."""
    down, across = size[0] / height, size[1] / width
    if across < down:
        return min(math.ceil(height * across), size[0]), size[1]
    return size[0], min(math.ceil(width * down), size[1])


def tiled(height: int, width: int, sizes: tuple[tuple[int, int], ...], tile: int, side: int, most: int) -> Tiled:
    """How a picture of this size is cut.

    Args:
        height, width: of the picture in pixels.
        sizes: that it may be fitted into.
        tile: side of a tile in pixels.
        side: of a tile in units.
        most: tiles that the kept grid has about as many units as, at most.
    """
    size = best_size(height, width, sizes)
    rows, cols = size[0] // tile, size[1] // tile
    down, across = rows * side, cols * side
    if width / height > across / down:
        seen = int(round(height * (across / width), 7))
        down -= 2 * ((down - seen) // 2)
    else:
        seen = int(round(width * (down / height), 7))
        across -= 2 * ((across - seen) // 2)
    ratio = math.sqrt(down * across / (most * side**2))
    kept = (int(down // ratio), int(across // ratio)) if ratio > RATIO else (down, across)
    return Tiled(rows, cols, down, across, kept)


def kept_part(height: int, width: int, form: Tiled, sizes: tuple[tuple[int, int], ...], side: int) -> Box:
    """The part of a picture that the kept grid of its tiles stands for, in fractions of the picture. It reaches beyond
    the picture by the column of ends, and by what was rounded. (What is over at the edges of a tile is not counted.)

    Args:
        height, width: of the picture in pixels.
        form: how it is cut into tiles.
        sizes: that it may be fitted into.
        side: of a tile in units.
    """
    size = best_size(height, width, sizes)
    edges = []
    for whole, made, tiles, seen, kept, ends in (
        (size[1], fitted(height, width, size)[1], form.cols, form.width, form.kept[1], 1),
        (size[0], fitted(height, width, size)[0], form.rows, form.height, form.kept[0], 0),
    ):
        unit = whole / (tiles * side)
        first = (tiles * side - seen) // 2 * unit - (whole - made) // 2
        edges.append((first / made, (first + seen * unit * (kept + ends) / kept) / made))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


@functools.lru_cache(maxsize=64)
def picture_mixes(form: Tiled, side: int) -> Mixes:
    """What the visual tokens of a picture are sums of.

    Args:
        form: how it is cut; its first tile is the whole picture.
        side: of a tile in units.
    """
    whole = _alone(np.arange(side**2))
    if form == ONE_TILE:
        return _joined(whole, _newlines(1))
    down, across = form.rows * side, form.cols * side
    y, x = np.indices((down, across))
    units = side**2 * (1 + y // side * form.cols + x // side) + y % side * side + x % side
    top, left = (down - form.height) // 2, (across - form.width) // 2
    seen = units[top : top + form.height, left : left + form.width]
    height, width = form.kept
    lines = _interpolated(seen, height, width)
    ended = [
        np.concatenate([part.reshape(height, width, 4), end.reshape(height, 1, 4)], axis=1).reshape(-1, 4)
        for part, end in zip(lines, _newlines(height), strict=True)
    ]
    return _joined(whole, Mixes(*ended))


@functools.lru_cache(maxsize=64)
def video_mixes(frames: int, side: int) -> Mixes:
    """What the visual tokens of a video are sums of: each frame at half its sides, and the learned row at the end."""
    half = -(-side // 2)
    one = _interpolated(np.arange(side**2).reshape(side, side), half, half)
    source = (one.source + (np.arange(frames) * side**2)[:, None, None]).reshape(-1, 4)
    return _joined(Mixes(source, np.tile(one.weight, (frames, 1))), _newlines(1))


def _interpolated(units: NpArray, height: int, width: int) -> Mixes:
    """A grid of units at another size, bilinearly, as torch's `interpolate` does in float32."""
    (top, bottom, down), (left, right, across) = (
        _along(length, made) for length, made in zip(units.shape, (height, width), strict=True)
    )
    corners = [units[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)]
    shares = [np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)]
    return Mixes(np.stack(corners, -1).reshape(-1, 4), np.stack(shares, -1).reshape(-1, 4).astype(np.float32))


def _along(length: int, made: int) -> tuple[NpArray, NpArray, NpArray]:
    """For each place of an axis of `made`, the two places of one of `length` that it lies between, and how far."""
    scale = np.float32(length) / np.float32(made)
    place = np.maximum((np.arange(made, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0))
    low = np.minimum(place.astype(np.int64), length - 1)
    return low, np.minimum(low + 1, length - 1), place - low.astype(np.float32)


def _alone(units: NpArray) -> Mixes:
    weight = np.zeros((len(units), 4), np.float32)
    weight[:, 0] = 1
    return Mixes(np.repeat(units[:, None], 4, axis=1), weight)


def _newlines(count: int) -> Mixes:
    mixes = _alone(np.zeros(count, np.int64))
    mixes.source[:, 0] = NEWLINE
    return mixes


def _joined(one: Mixes, other: Mixes) -> Mixes:
    source = np.concatenate([one.source, other.source]).astype(np.int32)
    weight = np.concatenate([one.weight, other.weight])
    for array in (source, weight):
        array.setflags(write=False)
    return Mixes(source, weight)
