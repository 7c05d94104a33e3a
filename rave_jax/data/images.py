"""Pictures to patches: reading, the resize rule of Qwen2-VL, and patches in order of their windows.

The pixels are those of transformers' `Qwen2VLImageProcessorPil` (5.23.0), bit for bit; ours stay bytes, since
rescaling and normalising belong on the device, and are already in the order the tower reads them.

What transformers does and we do alike:
- A file or its bytes are turned upright by their EXIF orientation (as its `load_image` does for a path in a chat
  message); a PIL image or an array is taken as it is.
- Transparency is laid over white (as its processor does with a PIL picture; its `load_image` would drop it), every
  other mode is converted to RGB by Pillow. Greys of more than 8 bits, which Pillow cuts off, are scaled (`grey.py`).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from rave_jax.batch import Patches
from rave_jax.data import grey
from rave_jax.data.grey import to_eight_bits
from rave_jax.data.opening import describe, is_encoded, opened, reason
from rave_jax.data.sample import ImageError
from rave_jax.typing import Int, NpArray, UInt8

MAX_ASPECT = 200
EXIF_ORIENTATION = 0x0112


class PatchGrid(NamedTuple):
    """How a picture or video is cut: the tower's geometry.

    Fields:
        patch, temporal, merge: side of a patch, frames in a patch, patches along the side of a merge unit.
        window: merge units along the side of an attention window of the tower.
    """

    patch: int
    temporal: int
    merge: int
    window: int

    @property
    def factor(self) -> int:
        """Pixels along the side of a merge unit: both sides of a resized picture are multiples of it."""
        return self.patch * self.merge


class CutPicture(NamedTuple):
    """A picture (one frame) or a video (t frames, each of `temporal` pictures), cut.

    Fields:
        patches: its patches, frame after frame.
        order: merge unit, counted from 0 over the whole, of each unit of the merged grid read frame, row, column.
        grid: size of the merged grid (t, h, w).
    """

    patches: Patches
    order: Int[NpArray, "N"]
    grid: tuple[int, int, int]


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Size (height, width) a picture is resized to: multiples of `factor`, aspect and pixel limits kept.

    Each side goes to the nearest multiple (ties to even); a picture over `max_pixels` is scaled down and rounded
    down, one under `min_pixels` scaled up and rounded up. A side is never below `factor`.

    Raises:
        ImageError: an empty picture, or one side more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(f"{width} x {height} pixels: the sides must be within a factor of {MAX_ASPECT} of each other")
    rows, cols = round(height / factor) * factor, round(width / factor) * factor
    if rows * cols > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        cols = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * cols < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        cols = math.ceil(width * grow / factor) * factor
    return rows, cols


def image_size(source: Any, name: str = "") -> tuple[int, int]:
    """Upright (height, width) of a picture; of a file, only the header is read.

    Raises:
        ImageError: not a picture.
    """
    try:
        with opened(source) as image:
            turned = is_encoded(source) and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
            return (width, height) if turned else (height, width)
    except Exception as error:
        raise ImageError(f"{describe(source, name)}: {reason(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_image(source: Any, name: str = "") -> Image.Image:
    """A picture, fully decoded, as RGB.

    Args:
        source: path, file: or data: URI, encoded bytes, PIL image, or uint8 array [H,W] or [H,W,1|3|4].
        name: what errors call it.

    Raises:
        ImageError: broken, cut off, animated, of several pages, or not a picture. Says which file.
    """
    called = describe(source, name)
    try:
        with opened(source) as image:
            _check_one(image)
            image.load()
            if is_encoded(source) and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            return _to_rgb(to_eight_bits(image, called) if image.mode in grey.MODES else image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"{called}: {reason(error)}") from error


def _check_one(image: Image.Image) -> None:
    """A file of several pictures is refused: which of them is meant?"""
    # A camera's MPO file holds a second picture and no animation; its first is the picture.
    if not getattr(image, "is_animated", False) or image.format == "MPO":
        return
    count = getattr(image, "n_frames", 2)
    if image.format == "TIFF":
        raise ImageError(f"a TIFF of {count} pages; save its pages as separate pictures and give those")
    raise ImageError(f"an animation of {count} frames ({image.format}); give its frames as a video")


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
def _patch_order(t: int, rows: int, cols: int, grid: PatchGrid) -> tuple[NpArray, NpArray, NpArray, NpArray, NpArray]:
    """Unit order in a frame, and frame, place, window, merged order of a whole picture or video."""
    unit_order, unit_window = window_order(rows, cols, grid.window)
    units, m2 = rows * cols, grid.merge**2
    number = np.arange(t, dtype=np.int32)
    frame = np.repeat(number + 1, units * m2)
    windows = int(unit_window[-1]) + 1
    window = np.repeat((number[:, None] * windows + unit_window + 1).reshape(-1), m2)
    inside = np.moveaxis(np.indices((grid.merge, grid.merge), dtype=np.int32), 0, -1).reshape(1, m2, 2)
    corner = np.stack([unit_order // cols, unit_order % cols], -1)[:, None] * grid.merge
    place = np.tile((corner + inside).reshape(-1, 2), (t, 1)).astype(np.int32)
    rank = np.empty(units, np.int32)
    rank[unit_order] = np.arange(units, dtype=np.int32)
    order = (number[:, None] * units + rank).reshape(-1).astype(np.int32)
    for array in (frame, place, window, order):
        array.setflags(write=False)
    return unit_order, frame, place, window, order


def cut(frames: list[UInt8[NpArray, "H W 3"]], grid: PatchGrid) -> CutPicture:
    """Patches of a video of resized frames; a picture is the video of itself, `temporal` times.

    Args:
        frames: pictures of one size, both sides multiples of `grid.factor`; their number a multiple of
            `grid.temporal`.
    """
    height, width, _ = frames[0].shape
    p, m = grid.patch, grid.merge
    rows, cols, t = height // (p * m), width // (p * m), len(frames) // grid.temporal
    unit_order, *codes, order = _patch_order(t, rows, cols, grid)
    pixels = np.empty((t, rows * cols, m * m, 3, grid.temporal, p, p), np.uint8)
    previous = None
    for number, frame in enumerate(frames):
        if previous is None or frame is not frames[number - 1]:
            # Channels first, then contiguous runs of p bytes: the strided copy below is the cost of this function.
            planes = np.ascontiguousarray(frame.transpose(2, 0, 1))
            blocks = planes.reshape(3, rows, m, p, cols, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
            previous = blocks.reshape(rows * cols, m * m, 3, p, p)[unit_order]
        pixels[number // grid.temporal, :, :, :, number % grid.temporal] = previous
    numbers = 3 * grid.temporal * p * p
    arrays: Any = (pixels.reshape(-1, numbers), *codes)
    return CutPicture(Patches(*arrays), order, (t, rows, cols))


def image_patches(source: Any, grid: PatchGrid, min_pixels: int, max_pixels: int, name: str = "") -> CutPicture:
    """Read, resize and cut one picture.

    Raises:
        ImageError: the picture cannot be used; says which file.
    """
    image = read_image(source, name)
    try:
        height, width = smart_resize(image.height, image.width, grid.factor, min_pixels, max_pixels)
    except ImageError as error:
        raise ImageError(f"{describe(source, name)}: {error}") from error
    return cut([resize(image, height, width)] * grid.temporal, grid)


def count_tokens(height: int, width: int, grid: PatchGrid, min_pixels: int, max_pixels: int) -> int:
    """Number of visual tokens of a picture of this size, from its size alone."""
    rows, cols = smart_resize(height, width, grid.factor, min_pixels, max_pixels)
    return (rows // grid.factor) * (cols // grid.factor)
