"""The rules of pictures and videos of any size, as transformers' processor of Qwen2-VL has them, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from rave_jax.config import ConfigError, require
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.pictures import (
    CutPicture,
    Encode,
    Frames,
    PictureError,
    PictureRules,
    Piece,
    ProcessorFiles,
    Visual,
    VisualKind,
)
from rave_jax.families.shared.grids.config import GridTowerConfig
from rave_jax.families.shared.grids.images import cut, resize, smart_resize
from rave_jax.families.shared.grids.positions import mrope_positions
from rave_jax.families.shared.grids.video import UNKNOWN_FPS, VideoLimits, frame_size, sample_frames
from rave_jax.families.shared.processor_files import bicubic, count, flag, rate, same_pixels, stated, steps
from rave_jax.families.shared.resampling import resized
from rave_jax.layout import Grid
from rave_jax.typing import Int, NpArray

STEPS = ("do_resize", "do_rescale", "do_normalize")
"""Keys of an image processor's file that say what is done with a picture; here it always is."""


@dataclass(frozen=True)
class Pictures(PictureRules):
    """Pictures of any size and videos, each frame a grid of merge units."""

    min_pixels: int = 56 * 56
    """Least pixels of a resized picture."""
    max_pixels: int = 28 * 28 * 1280
    """Most pixels of a resized picture."""
    video: VideoLimits = field(default_factory=VideoLimits)
    """Limits of a video's frames and pixels."""

    def __post_init__(self) -> None:
        low, high = self.min_pixels, self.max_pixels
        require(0 < low <= high, "min_pixels", low, f"1 to max_pixels {high}")

    @property
    def vision(self) -> GridTowerConfig:
        """The tower, which sets the sizes of patches."""
        return tower_of(self.config, GridTowerConfig)

    def limited(self, min_pixels: int | None, max_pixels: int | None) -> Self:
        """The rules with other limits of a resized picture's pixels, where they are given."""
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        return dataclasses.replace(self, min_pixels=low, max_pixels=high)

    def image_grid(self, height: int, width: int) -> Grid:
        """Merged grid (1, h, w) of a picture of this size."""
        return 1, *self._units(*self._resized(height, width))

    def cut_image(self, image: Image.Image) -> CutPicture:
        """Patches of a picture, which is resized and stands in each frame of them."""
        pixels = resize(image, *self._resized(image.height, image.width))
        return cut([pixels] * self.vision.temporal_patch_size, self.vision)

    def frames(self, total: int, fps: float | None) -> Frames:
        """Which frames are used of a video."""
        if self.video.fps is not None and fps is None:
            raise PictureError(f"sampling {self.video.fps} frames per second needs the part's own 'fps'")
        rate = UNKNOWN_FPS if fps is None else fps
        return Frames(sample_frames(total, rate, self.video, self.vision.temporal_patch_size), total, rate)

    def video_grid(self, height: int, width: int, frames: Frames) -> Grid:
        """Merged grid (t, h, w) of a video."""
        count = len(frames.indices)
        size = self.frame_size(height, width, count)
        return -(-count // self.vision.temporal_patch_size), *self._units(*size)

    def cut_video(self, images: Sequence[Image.Image], frames: Frames) -> CutPicture:
        """Patches of the used frames; the last frame is repeated where it does not fill its patches."""
        height, width = self.frame_size(images[0].height, images[0].width, len(images))
        pixels = [resized(np.asarray(image), height, width, "bicubic") for image in images]
        pixels += [pixels[-1]] * (-len(pixels) % self.vision.temporal_patch_size)
        return cut(pixels, self.vision)

    def expand(self, kind: VisualKind, grid: Grid, frames: Frames | None, encode: Encode) -> tuple[Piece, ...]:
        """The placeholder once for each visual token."""
        placeholder = self.image_token_id if kind == "image" else self.video_token_id
        seconds = None if frames is None else self.vision.temporal_patch_size / frames.used_rate
        return (Piece(np.full(grid[0] * grid[1] * grid[2], placeholder, np.int32), grid, seconds),)

    def positions(self, length: int, visuals: Sequence[Visual]) -> Int[NpArray, "3 T"]:
        """M-RoPE (`positions.py`)."""
        return mrope_positions(length, visuals, self.config.tokens_per_second)

    def frame_size(self, height: int, width: int, count: int) -> tuple[int, int]:
        """Size (height, width) that each of `count` frames of this size is resized to."""
        return frame_size(height, width, count, self.vision, self.video)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, self.vision.unit_size, self.min_pixels, self.max_pixels)

    def _units(self, height: int, width: int) -> tuple[int, int]:
        return height // self.vision.unit_size, width // self.vision.unit_size


def pictures(config: VlmConfig, files: ProcessorFiles) -> Pictures:
    """The rules of a model, with the limits that its processor files state.

    Raises:
        ConfigError: they ask for processing that is not done here.
    """
    return pictures_as(Pictures, config, files)


def pictures_as[P: Pictures](kind: type[P], config: VlmConfig, files: ProcessorFiles) -> P:
    """The same as a family's own kind of rules."""
    low, high = image_limits(files)
    file, video = files.video_file, files.video
    check_frames(config, files)
    samples = flag(file, video, "do_sample_frames", False)
    fps = None if video.get("fps") is None else rate(file, video, "fps")
    if samples and video.get("num_frames") is not None:
        raise ConfigError(f"{file}: num_frames is {video['num_frames']!r}, expected null: frames are sampled by fps")
    video_low, video_high = pixel_limits(file, video, VideoLimits.min_pixels, VideoLimits.max_pixels)
    limits = VideoLimits(
        min_pixels=video_low,
        max_pixels=video_high,
        fps=fps if samples else None,
        min_frames=count(file, video, "min_frames", VideoLimits.min_frames),
        max_frames=count(file, video, "max_frames", VideoLimits.max_frames),
        cap_total=flag(file, video, "cap_pixels_per_frame", False),
        max_tokens=count(file, video, "max_video_tokens", VideoLimits.max_tokens),
    )
    return kind(config, low, high, limits)


def image_limits(files: ProcessorFiles) -> tuple[int, int]:
    """Least and most pixels of a resized picture.

    Raises:
        ConfigError: the image processor's file asks for processing that is not done here.
    """
    image = files.image
    steps(files.image_file, image, STEPS)
    bicubic(files.image_file, image)
    return pixel_limits(files.image_file, image, Pictures.min_pixels, Pictures.max_pixels)


def check_frames(config: VlmConfig, files: ProcessorFiles) -> None:
    """Refuse a file of a video processor that asks of a frame what is not done with a picture.

    Raises:
        ConfigError: it does.
    """
    file, video = files.video_file, files.video
    assert config.vision is not None
    steps(file, video, STEPS)
    bicubic(file, video)
    same_pixels(file, video, config.vision.pixel_mean, config.vision.pixel_std)


EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Limits of pixels, and their names in `size`."""


def pixel_limits(file: Path, config: Mapping[str, Any], low: int, high: int) -> tuple[int, int]:
    """Least and most pixels of a resized picture: `min_pixels` and `max_pixels`, or else the entries of `size`.

    Entries of `size` may also have these names, as older versions of transformers wrote them. Where `size` is stated,
    it has to give what the other two do not, as in transformers.

    Raises:
        ConfigError: `size` is something else, a limit is missing or no number of pixels, or they cross.
    """
    size = stated(config, "size", {"shortest_edge": low, "longest_edge": high})
    expected = (
        "{'shortest_edge': least pixels, 'longest_edge': most pixels} or the keys min_pixels and max_pixels: "
        "pictures are resized between these limits"
    )
    if not isinstance(size, Mapping) or not size.keys() <= {*EDGES, *EDGES.values()}:
        raise ConfigError(f"{file}: size is {size!r}, expected {expected}")
    limits = []
    for key, edge in EDGES.items():
        for name, value in ((key, config.get(key)), (f"size.{edge}", size.get(edge)), (f"size.{key}", size.get(key))):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{file}: {name} is {value!r}, expected a number of pixels, 1 or more")
        value = next((v for v in (config.get(key), size.get(edge), size.get(key)) if v is not None), None)
        if value is None:
            raise ConfigError(f"{file}: size is {size!r} and {key} is missing, expected {expected}")
        limits.append(value)
    if limits[0] > limits[1]:
        raise ConfigError(f"{file}: min_pixels is {limits[0]}, above max_pixels {limits[1]}")
    return limits[0], limits[1]
