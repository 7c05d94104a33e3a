"""The rules of LLaVA-OneVision's pictures and videos, as transformers' processors have them, without torch.

The pixels are those of `LlavaOnevisionImageProcessorPil` and `LlavaOnevisionVideoProcessor` (5.23.0), bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.llava_onevision.anyres import (
    ONE_TILE,
    Mixes,
    Tiled,
    best_size,
    fitted,
    kept_part,
    picture_mixes,
    tiled,
    video_mixes,
)
from rave_jax.families.llava_onevision.config import AnyresConfig
from rave_jax.families.pictures import (
    CutPicture,
    Encode,
    Form,
    Frames,
    PictureError,
    PictureRules,
    Piece,
    ProcessorFiles,
    VisualKind,
)
from rave_jax.families.shared.processor_files import bicubic, flag, same_pixels, sides, stated, steps
from rave_jax.families.shared.resampling import resized
from rave_jax.families.shared.squares import check_aspect, square_of, squared
from rave_jax.families.shared.vit import cut_pictures
from rave_jax.layout import Box, Grid, inside
from rave_jax.typing import NpArray, UInt8

UNKNOWN_FPS = 24.0
STEPS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class Pictures(PictureRules):
    """One picture in tiles, several as a tile each, and videos."""

    in_tiles: bool = True
    """Is a picture cut into tiles? It is where it is the only one of its conversation."""

    @property
    def vision(self) -> AnyresConfig:
        """The tower, which sets the sizes of tiles and patches."""
        return tower_of(self.config, AnyresConfig)

    def among(self, pictures: int) -> Self:
        """The rules for a conversation of so many pictures."""
        return dataclasses.replace(self, in_tiles=pictures == 1)

    def image_grid(self, height: int, width: int) -> Tiled:
        """How a picture is cut."""
        check_aspect(height, width)
        tower = self.vision
        if not self.in_tiles:
            return ONE_TILE
        return tiled(height, width, tower.pinpoints, tower.image_size, tower.side, tower.most_tiles)

    def count_patches(self, grid: Form) -> int:
        """Patches of all tiles, or of all frames of a video."""
        tiles = 1 + grid.rows * grid.cols if isinstance(grid, Tiled) else grid[0]
        return tiles * self.vision.places

    def cut_image(self, image: Image.Image) -> CutPicture:
        """Patches of a picture: of the whole, and of its tiles."""
        form, side = self.image_grid(image.height, image.width), self.vision.image_size
        if form == ONE_TILE:
            tiles = [stretched(squared(image, self.vision.pixel_mean), side)]
        else:
            pixels = self._fitted(image)
            parts = pixels.reshape(form.rows, side, form.cols, side, 3).transpose(0, 2, 1, 3, 4)
            tiles = [stretched(image, side), *parts.reshape(-1, side, side, 3)]
        shown = self.shown(image.height, image.width, form)
        return self._cut(tiles, picture_mixes(form, self.vision.side), form, shown)

    def shown(self, height: int, width: int, form: Tiled) -> tuple[Box | None, ...]:
        """The part of a picture of this size that each of its two grids stands for; the end that stands alone, none."""
        if form == ONE_TILE:
            return inside(square_of(height, width), self.vision.seen), None
        return self.vision.seen, kept_part(height, width, form, self.vision.pinpoints, self.vision.side)

    def frames(self, total: int, fps: float | None) -> Frames:
        """All frames are used."""
        return Frames(np.arange(total, dtype=np.int64), total, UNKNOWN_FPS if fps is None else fps)

    def video_grid(self, height: int, width: int, frames: Frames) -> Grid:
        """Merged grid (t, h, w) of a video."""
        check_aspect(height, width)
        half = -(-self.vision.side // 2)
        return len(frames.indices), half, half

    def cut_video(self, images: Sequence[Image.Image], frames: Frames) -> CutPicture:
        """Patches of all frames."""
        grid = self.video_grid(images[0].height, images[0].width, frames)
        side = self.vision.image_size
        tiles = [resized(np.asarray(image), side, side, "bicubic") for image in images]
        return self._cut(tiles, video_mixes(len(tiles), self.vision.side), grid, (self.vision.seen, None))

    def expand(self, kind: VisualKind, grid: Form, frames: Frames | None, encode: Encode) -> tuple[Piece, ...]:
        """The placeholder once for each visual token. The whole picture, the grid of its tiles with the ends of lines
        as its last column, and an end that stands alone each count as a picture."""
        side, end = self.vision.side, (1, 1, 1)
        if kind == "video":
            if frames is None:
                raise PictureError("a video without frames")
            return self._piece(kind, grid, 1 / frames.used_rate), self._piece(kind, end, None)
        whole = self._piece(kind, (1, side, side))
        if grid == ONE_TILE:
            return whole, self._piece(kind, end)
        return whole, self._piece(kind, (1, grid.kept[0], grid.kept[1] + 1))

    def _piece(self, kind: VisualKind, grid: Grid, seconds: float | None = None) -> Piece:
        placeholder = self.image_token_id if kind == "image" else self.video_token_id
        return Piece(np.full(math.prod(grid), placeholder, np.int32), grid, seconds)

    def _fitted(self, image: Image.Image) -> UInt8[NpArray, "H W 3"]:
        """The picture in the middle of the size that it is fitted into."""
        size = best_size(image.height, image.width, self.vision.pinpoints)
        height, width = fitted(image.height, image.width, size)
        whole: Any = np.zeros((*size, 3), np.uint8)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        whole[top : top + height, left : left + width] = image.resize((width, height), Image.Resampling.BICUBIC)
        return whole

    def _cut(self, tiles: Sequence[Any], mixes: Mixes, form: Form, shown: tuple[Box | None, ...]) -> CutPicture:
        patches = cut_pictures(tiles, self.vision)
        # All tiles of a picture, and all frames of a video, go through the tower together.
        window: Any = np.ones(patches.length, np.int32)
        patches = patches._replace(window=window, source=mixes.source, weight=mixes.weight)
        return CutPicture(patches, np.arange(len(mixes.source), dtype=np.int32), form, shown)


def stretched(image: Image.Image, side: int) -> UInt8[NpArray, "side side 3"]:
    """A picture as a square."""
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def pictures(config: VlmConfig, files: ProcessorFiles) -> Pictures:
    """The rules of a model, from the files of its processors.

    Raises:
        ConfigError: they ask for processing that is not done here.
    """
    tower = tower_of(config, AnyresConfig)
    _check(files.image_file, files.image, tower)
    _check(files.video_file, files.video, tower)
    pinpoints = files.image.get("image_grid_pinpoints")
    if pinpoints is not None and pinpoints != [list(pair) for pair in tower.pinpoints]:
        raise ConfigError(
            f"{files.image_file}: image_grid_pinpoints are {pinpoints!s:.60}, expected those of config.json: the model "
            "puts tiles together as it says"
        )
    same_pixels(files.video_file, files.video, tower.pixel_mean, tower.pixel_std)
    if flag(files.video_file, files.video, "do_sample_frames", False):
        raise ConfigError(f"{files.video_file}: do_sample_frames is True, expected False: every frame is used")
    return Pictures(config)


def _check(file: Path, processor: Mapping[str, Any], tower: AnyresConfig) -> None:
    """Refuse a processor that makes other squares."""
    steps(file, processor, STEPS)
    bicubic(file, processor)
    if flag(file, processor, "do_center_crop", False):
        raise ConfigError(f"{file}: do_center_crop is True, expected False")
    made = sides(file, "size", stated(processor, "size", 384))
    if made != (tower.image_size, tower.image_size):
        raise ConfigError(
            f"{file}: size is {processor.get('size')!r}, expected {tower.image_size} x {tower.image_size}, the "
            "image_size of vision_config"
        )
