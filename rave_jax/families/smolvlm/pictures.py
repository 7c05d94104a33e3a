"""The rules of SmolVLM's pictures: rows and columns of tiles, each with its place as text, and the whole picture last.

The pixels are those of transformers' `SmolVLMImageProcessorPil` (5.23.0), bit for bit, and the tokens those of its
`SmolVLMProcessor`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rave_jax.config import ConfigError, require
from rave_jax.families.config import MAX_WIDTH, VlmConfig, tower_of
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
from rave_jax.families.shared.processor_files import flag, number_or_none, resampling, stated, steps
from rave_jax.families.shared.tiles import TileGrid, cut_tiles, tile_boxes
from rave_jax.families.smolvlm.config import VisionConfig
from rave_jax.layout import Grid

LANCZOS = 1
"""Pillow's number of the filter."""
MAX_ASPECT = 200
LONGEST = 4096
"""Most pixels of a resized picture's longer side, whatever is asked."""
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True)
class Pictures(PictureRules):
    """Pictures in tiles. The merged grid has a frame for each tile, the whole picture last."""

    longest_edge: int = 4 * 364
    """What the longer side of a picture is resized to before it is cut into tiles."""
    split: bool = True
    """Are pictures cut into tiles? Else each is one tile."""

    def __post_init__(self) -> None:
        edge = self.longest_edge
        require(1 <= edge <= MAX_WIDTH, "size.longest_edge", edge, f"a number of pixels from 1 to {MAX_WIDTH:,}")

    @property
    def vision(self) -> VisionConfig:
        """The tower, which sets the sizes of patches."""
        return tower_of(self.config, VisionConfig)

    def image_grid(self, height: int, width: int) -> TileGrid:
        """Merged grid of a picture of this size, a frame for each tile."""
        rows, cols = self._tiles(*self._resized(height, width))
        return TileGrid((rows, cols), rows * cols > 1, self.vision.token_side)

    def cut_image(self, image: Image.Image) -> CutPicture:
        """Patches of a picture's tiles, row by row, and of the whole picture where it has several."""
        grid, side = self.image_grid(image.height, image.width), self.vision.image_size
        rows, cols = grid.tiles
        whole = resized(resized(image, *self._resized(image.height, image.width)), rows * side, cols * side)
        pixels = np.asarray(whole)
        tiles = [
            pixels[row * side : (row + 1) * side, col * side : (col + 1) * side]
            for row, col in itertools.product(range(rows), range(cols))
        ]
        if len(tiles) > 1:
            tiles.append(np.asarray(resized(whole, side, side)))
        boxes = tile_boxes(rows, cols, len(tiles) > 1, self.vision)
        return cut_tiles(tiles, self.vision)._replace(grid=grid, shown=boxes)

    def expand(self, kind: VisualKind, grid: Grid, frames: Frames | None, encode: Encode) -> tuple[Piece, ...]:
        """Each tile behind its place, every row on a line of its own. Each tile counts as a picture of its own."""
        assert isinstance(grid, TileGrid), "it is from image_grid"
        count, rows, cols = grid
        one = Piece(np.full(rows * cols, self.image_token_id, np.int32), (1, rows, cols))
        before = [f"{AROUND}<row_{n // grid.tiles[1] + 1}_col_{n % grid.tiles[1] + 1}>" for n in range(count - 1)]
        # What ends a row of tiles stands in front of the next one, since a tokenizer may join it with that.
        before = [f"\n{text}" if n and n % grid.tiles[1] == 0 else text for n, text in enumerate(before)]
        before.append(f"\n\n{AROUND}{WHOLE}" if before else f"{AROUND}{WHOLE}")
        pieces = [piece for text in before for piece in (Piece(np.asarray(encode(text), np.int32)), one)]
        return (*pieces, Piece(np.asarray(encode(AROUND), np.int32)))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Size of a picture whose longer side is `longest_edge`; its shorter one is an even number."""
        if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
            raise PictureError(
                f"{width} x {height} pixels: the sides must be within a factor of {MAX_ASPECT} of each other"
            )
        return bounded(*longer_side(height, width, self.longest_edge), LONGEST)

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles of a picture that was resized to this size."""
        side = self.vision.image_size
        if not self.split:
            return 1, 1
        if width >= height:
            longer = math.ceil(width / side) * side
            return math.ceil(int(longer / (width / height)) / side), longer // side
        longer = math.ceil(height / side) * side
        return longer // side, math.ceil(int(longer * (width / height)) / side)


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


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """An RGB picture resized by Pillow's Lanczos filter."""
    return image.resize((width, height), Image.Resampling.LANCZOS)


def pictures(config: VlmConfig, files: ProcessorFiles) -> Pictures:
    """The rules of a model, from the file of its image processor.

    Raises:
        ConfigError: it asks for processing that is not done here.
    """
    file, image, side = files.image_file, files.image, tower_of(config, VisionConfig).image_size
    steps(file, image, ("do_resize", "do_rescale", "do_normalize"))
    resampling(file, image, {LANCZOS: "Lanczos"})
    tile = number_or_none(
        file, "max_image_size", stated(image, "max_image_size", {"longest_edge": 364}), "longest_edge"
    )
    if tile != side:
        found = image.get("max_image_size")
        raise ConfigError(
            f"{file}: max_image_size is {found!r}, expected {{'longest_edge': {side}}}, the image_size of vision_config"
        )
    edge = number_or_none(file, "size", stated(image, "size", {"longest_edge": 4 * 364}), "longest_edge")
    if edge is None:
        raise ConfigError(f"{file}: size is {image['size']!r}, expected {{'longest_edge': pixels}}")
    return Pictures(config, edge, flag(file, image, "do_image_splitting", True))
