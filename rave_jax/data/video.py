"""A video as a list of frames, read from files and memory. A family says which (`families/pictures.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rave_jax.data.images import image_size, read_image
from rave_jax.data.sample import ImageError
from rave_jax.families.pictures import CutPicture, Form, Frames, PictureError, PictureRules


def used_frames(frames: Sequence[Any], fps: float | None, rules: PictureRules, name: str = "") -> Frames:
    """Which frames are used of a video by the rules of a model.

    Args:
        frames: pictures in order, each as `read_image` takes it.
        fps: how many of them a second holds; None if not known.
        rules: of the model.
        name: what errors call the video.

    Raises:
        ImageError: no frames, too few of them, or an fps that is none or that is needed and missing.
    """
    name = name or "video"
    if isinstance(frames, (str, bytes)) or not hasattr(frames, "__len__"):
        raise ImageError(f"{name}: a video is {type(frames).__name__}: expected a list of frames")
    if not len(frames):
        raise ImageError(f"{name}: no frames")
    if fps is not None and not (isinstance(fps, int | float) and not isinstance(fps, bool) and 1e-3 <= fps <= 1e3):
        raise ImageError(f"{name}: fps is {fps!r:.40}, expected a number from 0.001 to 1000")
    try:
        return rules.frames(len(frames), fps)
    except PictureError as error:
        raise ImageError(f"{name}: {error}") from error


def cut_video(
    frames: Sequence[Any], fps: float | None, rules: PictureRules, name: str = ""
) -> tuple[CutPicture, Frames]:
    """Read the used frames of a video and cut them by the rules of a model.

    Args:
        frames, fps, rules, name: as in `used_frames`.

    Raises:
        ImageError: as there; and a broken frame, frames of several sizes, or a size that cannot be used.
    """
    used = used_frames(frames, fps, rules, name)
    images = [read_image(frames[i], _frame_name(name, i)) for i in used.indices]
    if len({image.size for image in images}) > 1:
        raise ImageError(f"{name or 'video'}: frames of several sizes {sorted({image.size for image in images})}")
    try:
        return rules.cut_video(images, used), used
    except PictureError as error:
        raise ImageError(f"{name or 'video'}: {error}") from error


def video_grid(frames: Sequence[Any], fps: float | None, rules: PictureRules, name: str = "") -> tuple[Form, Frames]:
    """The merged grid that a video has by the rules of a model, from the header of its first frame.

    Raises:
        ImageError: no frames, a first one that is no picture, or a size that cannot be used.
    """
    used = used_frames(frames, fps, rules, name)
    size = image_size(frames[used.indices[0]], _frame_name(name, used.indices[0]))
    try:
        return rules.video_grid(*size, used), used
    except PictureError as error:
        raise ImageError(f"{name or 'video'}: {error}") from error


def _frame_name(name: str, index: int) -> str:
    return f"{name} frame {index}" if name else ""
