"""Which frames of a video are used, at what size, and the text around them.

The rules are those of transformers' `SmolVLMVideoProcessor` and `SmolVLMProcessor` (5.23.0; `sample_frames`, `resize`,
`replace_video_token`, `apply_chat_template`):

- `fps` frames per second are used, `count` at most, evenly from the first frame to the last. Of a video with more than
  `count` * `fps` seconds beside its first and its last one, these two are left out.
- Every used frame is resized to a longer side of `longest`, then to a tile.
- Where the file does not say `do_sample_frames`, frames are sampled, as `apply_chat_template` does. Processors that
  transformers 5 saved say false: then every frame is used.
"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass

import numpy as np

from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.pictures import Frames, PictureError, ProcessorFiles
from rave_jax.families.shared.processor_files import (
    count,
    flag,
    number_or_none,
    rate,
    resampling,
    same_pixels,
    sides,
    stated,
    steps,
)
from rave_jax.families.smolvlm.config import VisionConfig
from rave_jax.families.smolvlm.numbers import spelled
from rave_jax.families.smolvlm.sizes import LONGEST, longer_side
from rave_jax.typing import Int, NpArray

UNKNOWN_FPS = 24.0
SKIPPED = 1
"""Seconds that are left out at each end of a long video."""
LANCZOS = 1
"""Pillow's number of the filter."""
OUTRO = "\n\n"
VIDEO_TEMPLATE = """\
<|im_start|>
{%- for message in messages -%}
  {{- message['role'] | capitalize -}}
  {%- if message['content'][0]['type'] == 'image' -%}:{%- else -%}{{- ': ' -}}{%- endif -%}
  {%- for line in message['content'] -%}
    {%- if line['type'] == 'text' -%}{{- line['text'] -}}
    {%- elif line['type'] == 'image' -%}<image>
    {%- elif line['type'] == 'video' -%}<video>
    {%- endif -%}
  {%- endfor -%}
  {{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class VideoLimits:
    """Which frames of a video are used, and their size before they become tiles."""

    fps: float | None = None
    """Frames per second to sample; None: all frames are used."""
    count: int = 64
    """Most frames to sample."""
    longest: int = 4 * 364
    """What the longer side of a frame is resized to, where `size` is None."""
    size: tuple[int, int] | None = None
    """Height and width that frames are resized to."""

    def indices(self, total: int, fps: float | None) -> Int[NpArray, "N"]:
        """Indices of the used frames, of `total` at `fps` per second.

        Raises:
            PictureError: a rate that is needed and not known.
        """
        if self.fps is None:
            return np.arange(total, dtype=np.int64)
        if fps is None:
            raise PictureError(f"sampling {self.fps} frames per second needs the part's own 'fps'")
        seconds = total / fps
        used = max(min(round(self.fps * seconds), self.count), 1)
        first, last = 0, total - 1
        if seconds - 2 * SKIPPED > self.count * self.fps:
            skipped = int(SKIPPED * fps), min(int(total - SKIPPED * fps), last)
            first, last = skipped if skipped[0] < skipped[1] else (first, last)
        return np.unique(np.linspace(first, last, used, dtype=np.int64))

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) that a frame has before it becomes a tile."""
        return self.size or longer_side(height, width, min(self.longest, LONGEST))


def introduction(frames: Frames) -> str:
    """How many frames there are, and how long the video is: where its rate is not known, until its last frame."""
    seconds = times(frames)[-1] if frames.guessed else frames.total / frames.rate
    count, duration = spelled(len(frames.indices)), datetime.timedelta(seconds=int(seconds))
    return f"You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"


def at_time(seconds: float) -> str:
    """What stands before a frame."""
    return f"\nFrame from {int(seconds // 60):02d}:{int(seconds % 60):02d}:"


def times(frames: Frames) -> list[float]:
    """The time in seconds of each used frame."""
    return [index / frames.rate for index in frames.indices.tolist()]


def video_limits(config: VlmConfig, files: ProcessorFiles) -> VideoLimits:
    """What the file of the video processor says.

    Raises:
        ConfigError: it asks for processing that is not done here.
    """
    file, video, vision = files.video_file, files.video, tower_of(config, VisionConfig)
    steps(file, video, ("do_resize", "do_rescale", "do_normalize"))
    resampling(file, video, {LANCZOS: "Lanczos"})
    half = (0.5, 0.5, 0.5)
    same_pixels(file, video, vision.pixel_mean, vision.pixel_std, (half, half))
    largest = stated(video, "max_image_size", {"longest_edge": 364})
    if number_or_none(file, "max_image_size", largest, "longest_edge") != vision.image_size:
        expected = f"{{'longest_edge': {vision.image_size}}}, the image_size of vision_config"
        raise ConfigError(f"{file}: max_image_size is {largest!r}, expected {expected}")
    # An older way to state the same three; `size` counts where both say it.
    older = stated(video, "video_sampling", {})
    if not isinstance(older, dict):
        raise ConfigError(f"{file}: video_sampling is {older!r}, expected {{'fps': ..., 'max_frames': ...}}")
    sampled = {"num_frames": older.get("max_frames"), "fps": older.get("fps")}
    if not older:
        sampled = {key: video.get(key) for key in sampled}
    size = stated(video, "size", stated(older, "video_size", {"longest_edge": VideoLimits.longest}))
    longest = number_or_none(file, "size", size, "longest_edge") if isinstance(size, dict) else None
    made = VideoLimits(size=sides(file, "size", size)) if longest is None else VideoLimits(longest=longest)
    missing = [key for key, value in sampled.items() if value is None]
    if not flag(file, video, "do_sample_frames", len(missing) < 2):
        return made
    if missing:
        raise ConfigError(
            f"{file}: {missing[0]} is missing: frames are sampled by num_frames and fps; to use every frame, set "
            "do_sample_frames to false"
        )
    fps, most = rate(file, sampled, "fps"), count(file, sampled, "num_frames", 1)
    return dataclasses.replace(made, fps=fps, count=most)
