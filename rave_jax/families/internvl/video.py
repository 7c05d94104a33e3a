"""Which frames of a video are used, as transformers' `InternVLVideoProcessor` (5.23.0, `sample_frames`) has it.

Frame i of n is floor(shift + i * total / n), in float32. Where the file does not say the shift, it is half a step, and
frames lie in the middle of n equal parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.internvl.config import VisionConfig
from rave_jax.families.pictures import PictureError, ProcessorFiles
from rave_jax.families.shared.processor_files import (
    bicubic,
    flag_or,
    positive_or_none,
    same_normalisation,
    sides,
    steps,
)
from rave_jax.typing import Int, NpArray

UNKNOWN_FPS = 24.0
PROCESSOR = "InternVLVideoProcessor"


@dataclass(frozen=True)
class Sampling:
    """How frames are sampled."""

    count: int | None = None
    """How many; None: as many as `fps` says."""
    fps: float | None = None
    """Frames per second, where `count` does not say how many."""
    shift: float | None = None
    """The first frame's place; None: the middle of the first of equal parts."""

    def indices(self, total: int, fps: float | None) -> Int[NpArray, "N"]:
        """Indices of the used frames, of `total` at `fps` per second.

        Raises:
            PictureError: too few frames, or a rate that is needed and not known.
        """
        count = self.count
        if count is None:
            if fps is None:
                raise PictureError(f"sampling {self.fps} frames per second needs the part's own 'fps'")
            assert self.fps is not None, "sampling_of sees to it"
            count = int(total / fps * self.fps)
        if not 1 <= count <= total:
            wanted = f"{count} are sampled" if self.count is None else f"{count} (num_frames) are sampled"
            raise PictureError(f"the video has {total} frames, of which {wanted}: expected 1 to {total}")
        step = total / count
        first = step / 2 if self.shift is None else self.shift
        places = first + np.arange(math.ceil((total - first) / step)) * step
        found = places.astype(np.float32).astype(np.int64)
        found = found[found < total]
        if not len(found):
            raise PictureError(f"the video has {total} frames, and the first one that is used would be {first:g}")
        return found


def sampling_of(config: VlmConfig, files: ProcessorFiles) -> Sampling | None:
    """What the file of the video processor says; None: all frames are used.

    Raises:
        ConfigError: it asks for processing that is not done here.
    """
    file, video, vision = files.video_file, files.video, tower_of(config, VisionConfig)
    stated = video.get("video_processor_type", PROCESSOR)
    if stated != PROCESSOR:
        raise ConfigError(f"{file}: video_processor_type is {stated!r}, expected {PROCESSOR!r}")
    steps(file, video, ("do_resize", "do_rescale", "do_normalize"))
    bicubic(file, video)
    if video.get("do_center_crop"):
        raise ConfigError(f"{file}: do_center_crop is {video['do_center_crop']!r}, expected False")
    size = video.get("size", {"height": 384, "width": 384})
    if sides(file, "size", size) != (vision.image_size, vision.image_size):
        side = vision.image_size
        raise ConfigError(f"{file}: size is {size!r}, expected {side} x {side}, the image_size of vision_config")
    same_normalisation(file, video, vision)
    if not flag_or(file, video, "do_sample_frames", False):
        return None
    count, fps = (positive_or_none(file, video, key) for key in ("num_frames", "fps"))
    if count is None and fps is None:
        raise ConfigError(f"{file}: do_sample_frames is True, expected num_frames or fps beside it")
    if count is not None and count != int(count):
        raise ConfigError(f"{file}: num_frames is {count!r}, expected a whole number")
    shift = video.get("initial_shift", True)
    if shift is not True and (not isinstance(shift, int | float) or not 0 <= shift < math.inf):
        raise ConfigError(f"{file}: initial_shift is {shift!r}, expected true or a number of frames, 0 or more")
    return Sampling(None if count is None else int(count), fps, None if shift is True else float(shift))
