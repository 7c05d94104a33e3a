"""The rules of SmolVLM's pictures: rows and columns of tiles, each with its place as text, and the whole picture last;
each frame of a video is one tile, with its time as text.

The pixels are those of transformers' `SmolVLMImageProcessorPil` and `SmolVLMVideoProcessor` (5.23.0), bit for bit, and
the tokens those of its `SmolVLMProcessor`. Of several videos in a conversation, that one names the frames of the
longest in front of each; ours names each video's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
from rave_jax.families.shared.resampling import resized as resampled
from rave_jax.families.shared.tiles import TileGrid, cut_tiles, tile_boxes
from rave_jax.families.smolvlm.config import VisionConfig
from rave_jax.families.smolvlm.sizes import LONGEST, bounded, longer_side
from rave_jax.families.smolvlm.video import (
    OUTRO,
    UNKNOWN_FPS,
    VIDEO_TEMPLATE,
    VideoLimits,
    at_time,
    introduction,
    times,
    video_limits,
)
from rave_jax.layout import Grid
from rave_jax.typing import NpArray, UInt8

LANCZOS = 1
"""Pillow's number of the filter."""
MAX_ASPECT = 200
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True)
class Pictures(PictureRules):
    """Pictures in tiles. The merged grid has a frame for each tile, the whole picture last."""

    longest_edge: int = 4 * 364
    """What the longer side of a picture is resized to before it is cut into tiles."""
    split: bool = True
    """Are pictures cut into tiles? Else each is one tile."""
    video: VideoLimits = field(default_factory=VideoLimits)
    """Which frames of a video are used, and their size before they become tiles."""

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

    @property
    def video_placeholder(self) -> str:
        """What the chat template writes for a video."""
        return "<video>"

    @property
    def video_template(self) -> str:
        """The chat template of conversations with videos, as transformers has it: that of released models writes
        nothing for a video."""
        return VIDEO_TEMPLATE

    def frames(self, total: int, fps: float | None) -> Frames:
        """Which frames are used of a video."""
        indices = self.video.indices(total, fps)
        return Frames(indices, total, UNKNOWN_FPS if fps is None else fps, guessed=fps is None)

    def video_grid(self, height: int, width: int, frames: Frames) -> Grid:
        """Merged grid of a video, whatever the size of its frames."""
        side = self.vision.token_side
        return len(frames.indices), side, side

    def cut_video(self, images: Sequence[Image.Image], frames: Frames) -> CutPicture:
        """Patches of the used frames, each a tile."""
        return cut_tiles([self._framed(image) for image in images], self.vision)

    def _framed(self, image: Image.Image) -> UInt8[NpArray, "S S 3"]:
        """A frame as a tile."""
        side, size = self.vision.image_size, self.video.frame_size(image.height, image.width)
        return resampled(resampled(np.asarray(image), *size, "lanczos"), side, side, "lanczos")

    def beside(self, frames: Frames) -> tuple[str, str]:
        """How many frames there are and how long the video is, with the time of the first frame; and a line behind the
        last."""
        return introduction(frames) + at_time(times(frames)[0]), OUTRO

    def expand(self, kind: VisualKind, grid: Grid, frames: Frames | None, encode: Encode) -> tuple[Piece, ...]:
        """Each tile of a picture behind its place, every row on a line of its own, or each frame of a video behind its
        time. Each tile counts as a picture of its own."""
        if frames is not None:
            return self._expand_video(grid, frames, encode)
        assert isinstance(grid, TileGrid), "it is from image_grid"
        count, rows, cols = grid
        one = Piece(np.full(rows * cols, self.image_token_id, np.int32), (1, rows, cols))
        before = [f"{AROUND}<row_{n // grid.tiles[1] + 1}_col_{n % grid.tiles[1] + 1}>" for n in range(count - 1)]
        # What ends a row of tiles stands in front of the next one, since a tokenizer may join it with that.
        before = [f"\n{text}" if n and n % grid.tiles[1] == 0 else text for n, text in enumerate(before)]
        before.append(f"\n\n{AROUND}{WHOLE}" if before else f"{AROUND}{WHOLE}")
        pieces = [piece for text in before for piece in (Piece(np.asarray(encode(text), np.int32)), one)]
        return (*pieces, Piece(np.asarray(encode(AROUND), np.int32)))

    def _expand_video(self, grid: Grid, frames: Frames, encode: Encode) -> tuple[Piece, ...]:
        _, rows, cols = grid
        one = Piece(np.full(rows * cols, self.image_token_id, np.int32), (1, rows, cols))
        texts = ["", *(f"{AROUND}{at_time(seconds)}" for seconds in times(frames)[1:])]
        before = [np.asarray(encode(f"{text}{AROUND}{WHOLE}"), np.int32) for text in texts]
        pieces = [piece for text in before for piece in (Piece(text), one)]
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
    split = flag(file, image, "do_image_splitting", True)
    return Pictures(config, edge, split, video_limits(config, files))
