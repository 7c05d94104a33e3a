"""The rules of these families' pictures and videos: times stand as text between the frames of a video.

They are those of transformers' `Qwen3VLProcessor` and `Qwen3VLVideoProcessor` (5.23.0; `sample_frames`, `resize`,
`replace_video_token`). A "frame" of the tower is a temporal patch: `temporal_patch_size` frames of the video.

- Frames per second wanted: n = total / fps * wanted, cut to a whole number and held between `min_frames` and the
  smaller of `max_frames` and the total. They lie evenly from the first to the last frame, each at the nearest index.
- All frames together keep the limits of pixels. With `cap_total`, one frame also takes at most `max_tokens` visual
  tokens and its even share of the most pixels, but not less than 1.05 * min_pixels.
- The time of a temporal patch is the mean of those of its first and last frame. It is written with one decimal.
- A last temporal patch that is not full repeats the last frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig
from rave_jax.families.pictures import Encode, Frames, PictureError, Piece, ProcessorFiles, VisualKind
from rave_jax.families.shared.grids.images import smart_resize
from rave_jax.families.shared.grids.pictures import Pictures, check_frames, image_limits, pixel_limits
from rave_jax.families.shared.grids.video import UNKNOWN_FPS, VideoLimits
from rave_jax.families.shared.processor_files import count, flag, rate
from rave_jax.layout import Grid
from rave_jax.typing import Int, NpArray


@dataclass(frozen=True)
class FrameLimits(VideoLimits):
    """Limits of a video's frames and pixels; those of pixels are of all frames together."""

    min_pixels: int = 128 * 32 * 32
    """Least pixels of all resized frames together."""
    max_pixels: int = 768 * 32 * 32
    """Most pixels of all resized frames together."""
    fps: float | None = 2.0
    """Frames per second to sample; None takes every frame given."""
    max_tokens: int = 768
    """Most visual tokens of one frame where `cap_total` is true."""


@dataclass(frozen=True)
class TimedPictures(Pictures):
    """Pictures of any size, and videos whose temporal patches are pictures of their own, each with its time before
    it."""

    video: FrameLimits = field(default_factory=FrameLimits)
    """Limits of a video's frames and pixels."""

    def frames(self, total: int, fps: float | None) -> Frames:
        """Which frames are used of a video."""
        limits, least = self.video, self.vision.temporal_patch_size
        if limits.fps is not None and fps is None:
            raise PictureError(f"sampling {limits.fps} frames per second needs the part's own 'fps'")
        rate = UNKNOWN_FPS if fps is None else fps
        indices = np.arange(total, dtype=np.int64) if limits.fps is None else sampled(total, rate, limits.fps, limits)
        if len(indices) < least:
            raise PictureError(
                f"the video has {total} frames, of which {len(indices)} are used; expected at least {least}"
            )
        return Frames(indices, total, rate)

    def frame_size(self, height: int, width: int, count: int) -> tuple[int, int]:
        """Size (height, width) that each of `count` frames of this size is resized to."""
        limits, factor, temporal = self.video, self.vision.unit_size, self.vision.temporal_patch_size
        most = limits.max_pixels
        if limits.cap_total:
            share = min(limits.max_tokens * factor**2, most // count)
            most = max(share, int(limits.min_pixels * 1.05)) * count
        if 0 < min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        counted = round(count / temporal) * temporal
        return smart_resize(height, width, factor, limits.min_pixels, most, count, counted)

    def expand(self, kind: VisualKind, grid: Grid, frames: Frames | None, encode: Encode) -> tuple[Piece, ...]:
        """The placeholder once for each visual token; of a video, time and picture of each temporal patch in turn."""
        if kind == "image" or frames is None:
            return super().expand(kind, grid, frames, encode)
        count, rows, cols = grid
        start, end = (self.config.vision_start_token_id, self.config.vision_end_token_id)
        picture = Piece(np.full(rows * cols, self.video_token_id, np.int32), (1, rows, cols))
        pieces, behind = [], []
        for seconds in times(frames, self.vision.temporal_patch_size)[:count]:
            before = [*behind, *encode(f"<{seconds:.1f} seconds>"), start]
            pieces += [Piece(np.asarray(before, np.int32)), picture]
            behind = [end]
        return (*pieces, Piece(np.asarray(behind, np.int32)))


def sampled(total: int, rate: float, wanted: float, limits: FrameLimits) -> Int[NpArray, "N"]:
    """Indices of the frames that are used of `total` frames at `rate`, where `wanted` are wanted in a second."""
    count = min(max(int(total / rate * wanted), limits.min_frames), limits.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def times(frames: Frames, temporal: int) -> list[float]:
    """The time in seconds of each temporal patch."""
    at = [index / frames.rate for index in frames.indices.tolist()]
    at += at[-1:] * (-len(at) % temporal)
    return [(at[n] + at[n + temporal - 1]) / 2 for n in range(0, len(at), temporal)]


def timed_pictures(config: VlmConfig, files: ProcessorFiles) -> TimedPictures:
    """The rules of a model, with the limits that its processor files state.

    Raises:
        ConfigError: they ask for processing that is not done here.
    """
    return TimedPictures(config, *image_limits(files), _frame_limits(config, files))


def _frame_limits(config: VlmConfig, files: ProcessorFiles) -> FrameLimits:
    video, file = files.video, files.video_file
    check_frames(config, files)
    if video.get("num_frames") is not None:
        raise ConfigError(f"{file}: num_frames is {video['num_frames']!r}, expected null: frames are sampled by fps")
    samples = flag(file, video, "do_sample_frames", True)
    fps = rate(file, video, "fps", FrameLimits.fps)
    low, high = pixel_limits(file, {"size": video.get("size")}, FrameLimits.min_pixels, FrameLimits.max_pixels)
    return FrameLimits(
        low,
        high,
        fps if samples else None,
        min_frames=count(file, video, "min_frames", FrameLimits.min_frames),
        max_frames=count(file, video, "max_frames", FrameLimits.max_frames),
        cap_total=flag(file, video, "cap_pixels_per_frame", False),
        max_tokens=count(file, video, "max_video_tokens", FrameLimits.max_tokens),
    )
