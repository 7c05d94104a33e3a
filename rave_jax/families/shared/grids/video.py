"""Which frames of a video are used, at what size, and how far apart in time.

The rules are those of transformers' `Qwen2VLVideoProcessor` (5.23.0, `sample_frames`, `resize`, `patchify`):

- Frames per second wanted: n = total / fps * wanted, held between `min_frames` and the smaller of `max_frames`
  (rounded down to a multiple of the temporal patch) and the total, then rounded down to a multiple of the temporal
  patch; frame i is floor(i * total / n). (Theirs is a float range, which for some lengths gives one index more, that of
  a frame behind the last; ours never does.)
- Every frame gets the size of the first by `smart_resize` under the video's pixel limits. With `cap_total`, the upper
  limit is also the frame's even share of a total budget, temporal * 0.9 * max_tokens * factor**2 / frames, but not
  below 1.05 * min_pixels.
- A last group that is not full repeats the last frame.
- Seconds between groups = temporal patch / rate of the frames used (24 frames per second where it is not known).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rave_jax.families.pictures import PictureError
from rave_jax.families.shared.grids.config import GridTowerConfig
from rave_jax.families.shared.grids.images import smart_resize
from rave_jax.typing import Int, NpArray

UNKNOWN_FPS = 24.0


@dataclass(frozen=True)
class VideoLimits:
    """Limits of a video's frames and pixels."""

    min_pixels: int = 128 * 28 * 28
    """Least pixels of a resized frame."""
    max_pixels: int = 768 * 28 * 28
    """Most pixels of a resized frame."""
    fps: float | None = None
    """Frames per second to sample; None takes every frame given."""
    min_frames: int = 4
    """Least frames to sample, where the video has them."""
    max_frames: int = 768
    """Most frames to sample."""
    cap_total: bool = False
    """Whether a frame's size is also bounded by its share of the whole video's budget."""
    max_tokens: int = 128_000
    """Context length from which that budget is derived (90 % of it)."""


def sample_frames(total: int, fps: float, limits: VideoLimits, temporal: int) -> Int[NpArray, "N"]:
    """Indices of the frames to keep of `total` frames at `fps`.

    Raises:
        PictureError: fewer frames than one temporal patch remain.
    """
    if limits.fps is None:
        return np.arange(total, dtype=np.int64)
    most = math.floor(min(limits.max_frames, total) / temporal) * temporal
    count = min(max(total / fps * limits.fps, limits.min_frames), most, total)
    count = math.floor(count / temporal) * temporal
    if count < 1:
        raise PictureError(f"{total} frames at {fps} per second are too few to sample {limits.fps} frames per second")
    return np.arange(count, dtype=np.int64) * total // count


def frame_size(height: int, width: int, frames: int, vision: GridTowerConfig, limits: VideoLimits) -> tuple[int, int]:
    """Size (height, width) that each of `frames` frames is resized to."""
    most, factor = limits.max_pixels, vision.unit_size
    if limits.cap_total:
        budget = int(limits.max_tokens * factor**2 * 0.9)
        most = max(min(most, budget * vision.temporal_patch_size // frames), int(limits.min_pixels * 1.05))
    return smart_resize(height, width, factor, limits.min_pixels, most)
