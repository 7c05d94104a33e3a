"""The rules of InternVL's pictures: tiles of one size, as many as fit the picture's aspect, and a thumbnail; each frame
of a video is one tile.

The pixels are those of transformers' `GotOcr2ImageProcessorPil` and `InternVLVideoProcessor` (5.23.0), bit for bit, and
the tokens those of its `InternVLProcessor`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rave_jax.config import ConfigError, require
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.internvl.config import VisionConfig
from rave_jax.families.internvl.video import UNKNOWN_FPS, Sampling, sampling_of
from rave_jax.families.pictures import (
    CutPicture,
    Encode,
    Frames,
    PictureError,
    PictureRules,
    Piece,
    ProcessorFiles,
    VisualKind,
)
from rave_jax.families.shared.processor_files import bicubic, count, sides, stated, steps
from rave_jax.families.shared.resampling import resized as resampled
from rave_jax.families.shared.tiles import cut_tiles, tile_boxes
from rave_jax.layout import Grid
from rave_jax.typing import NpArray, UInt8

MAX_ASPECT = 200
MAX_TILES = 1 << 10
START, END = "<img>", "</img>"


@dataclass(frozen=True)
class Pictures(PictureRules):
    """Pictures in tiles. The merged grid has a frame for each tile, the thumbnail last."""

    min_tiles: int = 1
    """Least tiles of a picture, the thumbnail not counted."""
    max_tiles: int = 12
    """Most tiles of a picture, the thumbnail not counted."""
    sampling: Sampling | None = None
    """Which frames of a video are used; None: all."""

    def __post_init__(self) -> None:
        low, high = self.min_tiles, self.max_tiles
        require(1 <= high <= MAX_TILES, "max_patches", high, f"a number from 1 to {MAX_TILES:,}")
        require(1 <= low <= high, "min_patches", low, f"1 to max_patches {high}")

    @property
    def vision(self) -> VisionConfig:
        """The tower, which sets the sizes of patches."""
        return tower_of(self.config, VisionConfig)

    def image_grid(self, height: int, width: int) -> Grid:
        """Merged grid of a picture of this size, a frame for each tile."""
        rows, cols = self._arrangement(height, width)
        return self._grid(rows * cols + (rows * cols > 1))

    def cut_image(self, image: Image.Image) -> CutPicture:
        """Patches of a picture's tiles, row by row, and of its thumbnail where it has several tiles."""
        rows, cols = self._arrangement(image.height, image.width)
        side = self.vision.image_size
        whole = resized(image, rows * side, cols * side)
        tiles = [
            whole[row * side : (row + 1) * side, col * side : (col + 1) * side]
            for row, col in itertools.product(range(rows), range(cols))
        ]
        if len(tiles) > 1:
            tiles.append(resized(image, side, side))
        boxes = tile_boxes(rows, cols, len(tiles) > 1, self.vision)
        return cut_tiles(tiles, self.vision)._replace(shown=boxes)

    @property
    def video_placeholder(self) -> str:
        """What the chat template writes for a video."""
        return "<video>"

    def frames(self, total: int, fps: float | None) -> Frames:
        """Which frames are used of a video."""
        rate = UNKNOWN_FPS if fps is None else fps
        indices = np.arange(total, dtype=np.int64) if self.sampling is None else self.sampling.indices(total, fps)
        return Frames(indices, total, rate, guessed=fps is None)

    def video_grid(self, height: int, width: int, frames: Frames) -> Grid:
        """Merged grid of a video, whatever the size of its frames."""
        return self._grid(len(frames.indices))

    def cut_video(self, images: Sequence[Image.Image], frames: Frames) -> CutPicture:
        """Patches of the used frames, each a tile."""
        side = self.vision.image_size
        return cut_tiles([resampled(np.asarray(image), side, side, "bicubic") for image in images], self.vision)

    def beside(self, frames: Frames) -> tuple[str, str]:
        """The name of the first frame."""
        return _name(1), ""

    def expand(self, kind: VisualKind, grid: Grid, frames: Frames | None, encode: Encode) -> tuple[Piece, ...]:
        """The tiles of a picture between its marks, or each frame of a video between them and behind its name. Each
        tile counts as a picture of its own."""
        tiles, rows, cols = grid
        one = Piece(np.full(rows * cols, self.image_token_id, np.int32), (1, rows, cols))
        if kind == "image":
            return (_text(START, encode), *[one] * tiles, _text(END, encode))
        before = [START, *(f"{END}\n{_name(number)}{START}" for number in range(2, tiles + 1))]
        return (*(piece for text in before for piece in (_text(text, encode), one)), _text(END, encode))

    def _arrangement(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
            raise PictureError(
                f"{width} x {height} pixels: the sides must be within a factor of {MAX_ASPECT} of each other"
            )
        return arrangement(height, width, self.vision.image_size, self.min_tiles, self.max_tiles)

    def _grid(self, tiles: int) -> Grid:
        return tiles, self.vision.token_side, self.vision.token_side


def _name(number: int) -> str:
    return f"Frame{number}: "


def _text(text: str, encode: Encode) -> Piece:
    return Piece(np.asarray(encode(text), np.int32))


def resized(image: Image.Image, height: int, width: int) -> UInt8[NpArray, "H W 3"]:
    """Pixels of an RGB picture resized by Pillow's bicubic filter."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


@functools.lru_cache(maxsize=64)
def arrangements(least: int, most: int) -> Sequence[tuple[int, int]]:
    """(rows, columns) of `least` to `most` tiles, by their number, then by columns."""
    pairs = itertools.product(range(1, most + 1), repeat=2)
    found = [(rows, cols) for cols, rows in pairs if least <= rows * cols <= most]
    return sorted(found, key=lambda pair: pair[0] * pair[1])


def arrangement(height: int, width: int, side: int, least: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles whose aspect is nearest to a picture's.

    Of several of one aspect the one with most tiles is taken whose pixels are fewer than twice those of the picture.
    (InternVL 1.5, arXiv 2404.16821, section 3.3.)

    Args:
        height, width: of the picture.
        side: of a tile.
        least, most: how many tiles there may be.
    """
    best, nearest = (1, 1), float("inf")
    for rows, cols in arrangements(least, most):
        off = abs(width / height - cols / rows)
        if off < nearest or (off == nearest and height * width > 0.5 * side * side * rows * cols):
            best, nearest = (rows, cols), off
    return best


def pictures(config: VlmConfig, files: ProcessorFiles) -> Pictures:
    """The rules of a model, from the file of its image processor.

    Raises:
        ConfigError: it asks for processing that is not done here.
    """
    file, image, side = files.image_file, files.image, tower_of(config, VisionConfig).image_size
    steps(file, image, ("do_resize", "do_rescale", "do_normalize"))
    bicubic(file, image)
    size = sides(file, "size", stated(image, "size", {"height": 384, "width": 384}))
    if size != (side, side):
        raise ConfigError(
            f"{file}: size is {image.get('size')!r}, expected {side} x {side}, the image_size of vision_config"
        )
    limits = [count(file, image, key, n, "number of tiles") for key, n in (("min_patches", 1), ("max_patches", 12))]
    try:
        return Pictures(config, *limits, sampling_of(config, files))
    except ConfigError as error:
        raise error if str(error).startswith(str(files.video_file)) else ConfigError(f"{file}: {error}") from error
