"""Which frames of a video are used, as transformers' `InternVLVideoProcessor` (5.23.0, `sample_frames`) has it.

Frame i of n is floor(shift + i * total / n), in float32. Where the file does not say the shift, it is half a step, and
frames lie in the middle of n equal parts. (For some shifts theirs gives one index more, that of a frame behind the
last; ours never does.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rave_jax.config import ConfigError
from rave_jax.families.config import TowerConfig, VlmConfig, tower_of
from rave_jax.families.internvl.config import VisionConfig
from rave_jax.families.pictures import PictureError, ProcessorFiles
from rave_jax.families.shared.processor_files import bicubic, count, flag, rate, same_pixels, sides, stated, steps
from rave_jax.typing import Int, NpArray

UNKNOWN_FPS = 24.0


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
    steps(file, video, ("do_resize", "do_rescale", "do_normalize"))
    bicubic(file, video)
    if flag(file, video, "do_center_crop", False):
        raise ConfigError(f"{file}: do_center_crop is True, expected False")
    size = stated(video, "size", {"height": 384, "width": 384})
    if sides(file, "size", size) != (vision.image_size, vision.image_size):
        side = vision.image_size
        raise ConfigError(f"{file}: size is {size!r}, expected {side} x {side}, the image_size of vision_config")
    # A file that states none has CLIP's.
    same_pixels(file, video, vision.pixel_mean, vision.pixel_std, (TowerConfig.pixel_mean, TowerConfig.pixel_std))
    if not flag(file, video, "do_sample_frames", False):
        return None
    frames = None if video.get("num_frames") is None else count(file, video, "num_frames", 1)
    fps = None if video.get("fps") is None else rate(file, video, "fps")
    if frames is None and fps is None:
        raise ConfigError(f"{file}: do_sample_frames is True, expected num_frames or fps beside it")
    shift = stated(video, "initial_shift", True)
    if shift is not True and (not isinstance(shift, int | float) or not 0 <= shift < math.inf):
        raise ConfigError(f"{file}: initial_shift is {shift!r}, expected true or a number of frames, 0 or more")
    return Sampling(frames, fps, None if shift is True else float(shift))
