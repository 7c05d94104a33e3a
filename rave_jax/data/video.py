"""A video as a list of frames: which frames, at what size, and how far apart in time.

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

Their resize runs in torch and differs from Pillow's in the last bits of some pixels; ours is Pillow's throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rave_jax.data.images import CutPicture, PatchGrid, cut, read_image, resize, smart_resize
from rave_jax.data.sample import ImageError
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
        ImageError: fewer frames than one temporal patch remain.
    """
    if limits.fps is None:
        return np.arange(total, dtype=np.int64)
    most = math.floor(min(limits.max_frames, total) / temporal) * temporal
    count = min(max(total / fps * limits.fps, limits.min_frames), most, total)
    count = math.floor(count / temporal) * temporal
    if count < 1:
        raise ImageError(f"{total} frames at {fps} per second: too few to sample {limits.fps} per second")
    return np.arange(count, dtype=np.int64) * total // count


def frame_size(height: int, width: int, frames: int, grid: PatchGrid, limits: VideoLimits) -> tuple[int, int]:
    """Size (height, width) that each of `frames` frames is resized to."""
    most = limits.max_pixels
    if limits.cap_total:
        budget = int(limits.max_tokens * grid.factor**2 * 0.9)
        most = max(min(most, budget * grid.temporal // frames), int(limits.min_pixels * 1.05))
    return smart_resize(height, width, grid.factor, limits.min_pixels, most)


def kept_frames(
    frames: Sequence[Any], fps: float | None, grid: PatchGrid, limits: VideoLimits, name: str = ""
) -> tuple[Int[NpArray, "N"], float]:
    """Indices of the frames that are used of a video, and how many frames it has in a second.

    Args:
        frames, fps, name: as in `video_patches`.
        grid, limits: of the model.

    Raises:
        ImageError: no frames, too few of them, or an fps that is none or that is needed and missing.
    """
    name = name or "video"
    if isinstance(frames, (str, bytes)) or not hasattr(frames, "__len__"):
        raise ImageError(f"{name}: a video is {type(frames).__name__}: expected a list of frames")
    if not len(frames):
        raise ImageError(f"{name}: no frames")
    if limits.fps is not None and not fps:
        raise ImageError(f"{name}: sampling {limits.fps} frames per second needs the part's own 'fps'")
    if fps is not None and not (isinstance(fps, int | float) and not isinstance(fps, bool) and 1e-3 <= fps <= 1e3):
        raise ImageError(f"{name}: fps is {fps!r:.40}, expected a number from 0.001 to 1000")
    rate = fps or UNKNOWN_FPS
    try:
        return sample_frames(len(frames), rate, limits, grid.temporal), rate
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def video_patches(
    frames: Sequence[Any], fps: float | None, grid: PatchGrid, limits: VideoLimits, name: str = ""
) -> tuple[CutPicture, float]:
    """Sample, read, resize and cut a video.

    Args:
        frames: pictures in order, each as `read_image` takes it.
        fps: how many of them a second holds; None if not known.
        name: what errors call the video.

    Returns:
        (patches, seconds): seconds between two groups of frames.

    Raises:
        ImageError: no frames, a broken one, or frames of several sizes.
    """
    keep, rate = kept_frames(frames, fps, grid, limits, name)
    images = [read_image(frames[i], f"{name} frame {i}" if name else "") for i in keep]
    if len({image.size for image in images}) > 1:
        raise ImageError(f"{name or 'video'}: frames of several sizes {sorted({image.size for image in images})}")
    height, width = frame_size(images[0].height, images[0].width, len(images), grid, limits)
    pixels = [resize(image, height, width) for image in images]
    pixels += [pixels[-1]] * (-len(pixels) % grid.temporal)
    sampled = len(keep) / len(frames) * rate
    return cut(pixels, grid), grid.temporal / sampled
