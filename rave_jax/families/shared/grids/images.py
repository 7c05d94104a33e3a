"""Pictures to patches: the resize rule of Qwen2-VL, and patches in the order of the tower's windows.

The pixels are those of transformers' `Qwen2VLImageProcessorPil` (5.23.0), bit for bit; ours stay bytes, since
rescaling and normalising belong on the device, and are already in the order the tower reads them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from PIL import Image

from rave_jax.batch import Patches
from rave_jax.families.pictures import CutPicture, PictureError
from rave_jax.families.shared.grids.config import GridTowerConfig
from rave_jax.typing import Int, NpArray, UInt8

MAX_ASPECT = 200


def smart_resize(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
    counted: int | None = None,
) -> tuple[int, int]:
    """Size (height, width) a picture is resized to: multiples of `factor`, aspect and pixel limits kept.

    Each side goes to the nearest multiple (ties to even); a picture over `max_pixels` is scaled down and rounded
    down, one under `min_pixels` scaled up and rounded up. A side is never below `factor`.

    Args:
        height, width: of the picture.
        factor: of both sides.
        min_pixels, max_pixels: limits.
        frames: pictures of this size that share the limits.
        counted: how many pictures are counted when sizes are held against the limits, if not `frames`.

    Raises:
        PictureError: an empty picture, or one side more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise PictureError(
            f"{width} x {height} pixels: the sides must be within a factor of {MAX_ASPECT} of each other"
        )
    rows, cols = round(height / factor) * factor, round(width / factor) * factor
    pixels = (frames if counted is None else counted) * rows * cols
    if pixels > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        cols = max(factor, math.floor(width / shrink / factor) * factor)
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        cols = math.ceil(width * grow / factor) * factor
    return rows, cols


def resize(image: Image.Image, height: int, width: int) -> UInt8[NpArray, "H W 3"]:
    """Pixels of an RGB picture resized by Pillow's bicubic filter."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


@functools.lru_cache(maxsize=1024)
def window_order(rows: int, cols: int, window: int) -> tuple[Int[NpArray, "N"], Int[NpArray, "N"]]:
    """Merge units of a frame, window by window.

    Windows tile the merged grid from its top left corner; those at the right and bottom edges may be partial. Both
    windows and the units inside one are read row by row. This is Qwen2.5-VL's window index.

    Returns:
        (order, index): order[n] is the raster number of the n-th unit in window order; index[n] its window, from 0.
    """
    row, col = (axis.reshape(-1) for axis in np.indices((rows, cols), dtype=np.int32))
    key = (row // window) * (-(-cols // window)) + col // window
    order = np.argsort(key, kind="stable").astype(np.int32)
    index = np.unique(key[order], return_inverse=True)[1].astype(np.int32)
    order.setflags(write=False)
    index.setflags(write=False)
    return order, index


@functools.lru_cache(maxsize=1024)
def _patch_order(t: int, rows: int, cols: int, merge: int, side: int | None) -> tuple[Any, ...]:
    """Unit order in a frame, and frame, place, window, merged order of a whole picture or video."""
    unit_order, unit_window = window_order(rows, cols, side or max(rows, cols))
    units, m2 = rows * cols, merge**2
    number = np.arange(t, dtype=np.int32)
    frame = np.repeat(number + 1, units * m2)
    windows = int(unit_window[-1]) + 1
    window = np.repeat((number[:, None] * windows + unit_window + 1).reshape(-1), m2)
    inside = np.moveaxis(np.indices((merge, merge), dtype=np.int32), 0, -1).reshape(1, m2, 2)
    corner = np.stack([unit_order // cols, unit_order % cols], -1)[:, None] * merge
    place = np.tile((corner + inside).reshape(-1, 2), (t, 1)).astype(np.int32)
    rank = np.empty(units, np.int32)
    rank[unit_order] = np.arange(units, dtype=np.int32)
    order = (number[:, None] * units + rank).reshape(-1).astype(np.int32)
    for array in (frame, place, window, order):
        array.setflags(write=False)
    return unit_order, frame, place, window, order


def cut(frames: list[UInt8[NpArray, "H W 3"]], vision: GridTowerConfig) -> CutPicture:
    """Patches of a video of resized frames; a picture is the video of itself, `temporal` times.

    Args:
        frames: pictures of one size, both sides multiples of a merge unit's; their number a multiple of
            `temporal_patch_size`.
        vision: the tower that reads them.
    """
    height, width, _ = frames[0].shape
    p, m, temporal = vision.patch_size, vision.merge_size, vision.temporal_patch_size
    rows, cols, t = height // (p * m), width // (p * m), len(frames) // temporal
    unit_order, *codes, order = _patch_order(t, rows, cols, m, vision.window_units)
    pixels: Any = np.empty((t, rows * cols, m * m, 3, temporal, p, p), np.uint8)
    previous = None
    for number, frame in enumerate(frames):
        if previous is None or frame is not frames[number - 1]:
            # Channels first, then contiguous runs of p bytes: the strided copy below is the cost of this function.
            planes = np.ascontiguousarray(frame.transpose(2, 0, 1))
            blocks = planes.reshape(3, rows, m, p, cols, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
            previous = blocks.reshape(rows * cols, m * m, 3, p, p)[unit_order]
        pixels[number // temporal, :, :, :, number % temporal] = previous
    numbers = 3 * temporal * p * p
    return CutPicture(Patches(pixels.reshape(-1, numbers), *codes), order, (t, rows, cols))
