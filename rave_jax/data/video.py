"""Videos, as lists of frames or as files: which frames are used and what becomes of them. A family says
(`families/pictures.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from rave_jax.data.images import image_size, read_image
from rave_jax.data.opening import describe, is_encoded
from rave_jax.data.sample import ImageError
from rave_jax.data.video_file import decoded, read_header
from rave_jax.families.pictures import CutPicture, Form, Frames, PictureError, PictureRules


class _Used(NamedTuple):
    """The frames of a video that are used.

    Fields:
        frames: which.
        size: upright (height, width) of the first frame.
        read: decodes them in their order; a frame lives only as long as it is looked at.
    """

    frames: Frames
    size: tuple[int, int]
    read: Callable[[], Iterator[Image.Image]]


class _Pictures(Sequence[Image.Image]):
    """Frames of one size, decoded as they are taken: the frames of a long video need not be in memory together."""

    def __init__(self, used: _Used, name: str):
        self._used, self._name = used, name

    def __len__(self) -> int:
        return len(self._used.frames.indices)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index] if index else next(iter(self))

    def __iter__(self) -> Iterator[Image.Image]:
        size = None
        for image in self._used.read():
            size = size or image.size
            if image.size != size:
                raise ImageError(f"{self._name}: frames of several sizes {sorted({size, image.size})}")
            yield image


def cut_video(video: Any, fps: float | None, rules: PictureRules, name: str = "") -> tuple[CutPicture, Frames]:
    """Read the used frames of a video and cut them by the rules of a model.

    Args:
        video: frames in order, each as `read_image` takes it; or a video file as a path, a file: or data: URI or bytes.
        fps: how many of the frames a second holds; None if not known. A file says it itself.
        rules: of the model.
        name: what errors call the video.

    Raises:
        ImageError: no frames, too few of them, or an fps that is none, that is needed and missing or that is not the
            file's; a broken frame, frames of several sizes, or a size that cannot be used.
    """
    used = _used(video, fps, rules, name)
    called = _called(video, name)
    try:
        return rules.cut_video(_Pictures(used, called), used.frames), used.frames
    except PictureError as error:
        raise ImageError(f"{called}: {error}") from error


def used_frames(video: Any, fps: float | None, rules: PictureRules, name: str = "") -> Frames:
    """Which frames of a video are used, from its first frame and the header of its file.

    Raises:
        ImageError: as `video_grid`.
    """
    return _used(video, fps, rules, name).frames


def video_grid(video: Any, fps: float | None, rules: PictureRules, name: str = "") -> tuple[Form, Frames]:
    """The merged grid that a video has by the rules of a model, from its first frame and the header of its file.

    Raises:
        ImageError: no frames, a first one that is no picture, or a size that cannot be used.
    """
    used = _used(video, fps, rules, name)
    try:
        return rules.video_grid(*used.size, used.frames), used.frames
    except PictureError as error:
        raise ImageError(f"{_called(video, name)}: {error}") from error


def grey_frames(video: Any, fps: float | None, colour: Any, name: str = "") -> tuple[list[Image.Image], float | None]:
    """As many frames of one colour, of the size of the first one, and how many of them a second holds.

    Raises:
        ImageError: no video.
    """
    if is_encoded(video):
        header = read_header(video, name)
        return [Image.new("RGB", (header.width, header.height), colour)] * header.frames, header.fps
    frames = []
    for number, frame in enumerate(video):
        height, width = image_size(frame, _frame_name(name, number))
        frames.append(Image.new("RGB", (width, height), colour))
    return frames, fps


def _used(video: Any, fps: float | None, rules: PictureRules, name: str) -> _Used:
    called = _called(video, name)
    if fps is not None and not (isinstance(fps, int | float) and not isinstance(fps, bool) and 1e-3 <= fps <= 1e3):
        raise ImageError(f"{called}: fps is {fps!r:.40}, expected a number from 0.001 to 1000")
    if is_encoded(video):
        header = read_header(video, name)
        if fps is not None and header.fps is not None and abs(fps - header.fps) > 0.01 * header.fps:
            raise ImageError(
                f"{called}: fps is {fps:g}, but the file holds {header.fps:g} frames per second; leave 'fps' out: it "
                "says how fast the video is, and the model's own files say how many frames are used"
            )
        frames = _frames(header.frames, header.fps or fps, rules, called)
        return _Used(frames, (header.height, header.width), lambda: decoded(video, frames.indices, name))
    if not hasattr(video, "__len__"):
        raise ImageError(f"{called}: a video is {type(video).__name__}: expected a list of frames or a video file")
    if not len(video):
        raise ImageError(f"{called}: no frames")
    frames = _frames(len(video), fps, rules, called)
    first = frames.indices[0]
    size = image_size(video[first], _frame_name(name, first))
    return _Used(frames, size, lambda: (read_image(video[i], _frame_name(name, i)) for i in frames.indices))


def _frames(total: int, fps: float | None, rules: PictureRules, called: str) -> Frames:
    try:
        return rules.frames(total, fps)
    except PictureError as error:
        raise ImageError(f"{called}: {error}") from error


def _called(video: Any, name: str) -> str:
    return describe(video, name) if is_encoded(video) else name or "video"


def _frame_name(name: str, index: int) -> str:
    return f"{name} frame {index}" if name else ""
