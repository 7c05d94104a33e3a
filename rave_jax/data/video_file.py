"""Video files, decoded by PyAV: what a header says, and the frames of some indices, upright.

A frame has the pixels of PyAV's `rgb24`. Frames are counted as transformers' `read_video_pyav` (5.23.0) counts them, in
the order they are shown, and the header's number of frames and average rate say which of them a family uses. Where a
header has no number of frames, as in Matroska and WebM, the packets of the file are counted, and nothing is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rave_jax.config import ConfigError
from rave_jax.data.opening import describe, is_data, open_encoded, reason
from rave_jax.data.sample import ImageError, VideoError
from rave_jax.typing import NpArray

INSTALL = "pip install 'rave-jax[video]', or pip install av"
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    "avi",
    "flv",
    "live_flv",
    "mpegts",
    "mpeg",
    "mpegvideo",
    "asf",
    "ogg",
    "gif",
    "mxf",
    "h264",
    "hevc",
)
"""Containers that are read. Others may lead to further files or to addresses on the net, as playlists do."""
MOST_FRAMES = 1 << 22
"""Of a video; two days at 24 frames per second."""
MOST_PIXELS = 1 << 26
"""Of a frame; 8K video has half of them."""
CUT_OFF = 0.9
"""A counted file whose last packet ends before this share of its length is cut off."""
TURNS = {
    (1, 0, 0, 1): None,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""What makes a frame upright, by the signs of a, b, c and d in (x, y) -> (a x + c y, b x + d y)."""


class VideoHeader(NamedTuple):
    """What is known of a video file without decoding more than its first frame.

    Fields:
        frames: how many there are.
        fps: how many of them a second holds on average; None where the file does not say.
        height, width: of its first frame, upright.
    """

    frames: int
    fps: float | None
    height: int
    width: int


def read_header(source: Any, name: str = "") -> VideoHeader:
    """The header of a video file.

    Args:
        source: path, file: or data: URI, or the bytes of a file.
        name: what errors call it.

    Raises:
        VideoError: no video that can be read, one without frames, or a header that claims what cannot be.
        ConfigError: PyAV is not installed.
    """
    known = _stamp(source)
    return _read_header(source, name) if known is None else _kept_header(known, name)


def _stamp(source: Any) -> tuple[str, int, int] | None:
    """A local file and its state; None for what is none."""
    if isinstance(source, bytes):
        return None
    try:
        path = os.fsdecode(source).removeprefix("file://")
        stat = os.stat(path)
    except (TypeError, ValueError, OSError):
        return None
    return path, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=256)
def _kept_header(stamp: tuple[str, int, int], name: str) -> VideoHeader:
    """A video is asked for its header several times on its way into a row."""
    return _read_header(stamp[0], name)


def _read_header(source: Any, name: str) -> VideoHeader:
    with _opened(source, name) as (container, stream):
        frames, rate = int(stream.frames), stream.average_rate
        fps = float(rate) if rate else None
        if fps is not None and not 1e-3 <= fps <= 1e3:
            raise VideoError(f"the header says {fps:g} frames per second, expected 0.001 to 1000")
        _check_claims(frames, stream.width, stream.height)
        image = next(_images(container, stream), None)
        if image is None:
            raise VideoError("no frame of it can be decoded")
    if frames <= 0:
        with _opened(source, name) as (container, stream):
            frames = _count(container, stream)
            _check_claims(frames, stream.width, stream.height)
    return VideoHeader(frames, fps, image.height, image.width)


def decoded(source: Any, indices: Sequence[int] | NpArray, name: str = "") -> Iterator[Image.Image]:
    """Frames of a video file as upright RGB pictures. The file is decoded as they are taken, and no others are kept.

    Args:
        source, name: as in `read_header`.
        indices: of the frames, ascending, from 0.

    Raises:
        VideoError: a frame that is not there, that is damaged, or that the file cannot be decoded up to.
    """
    wanted = [int(index) for index in indices]
    given = seen = 0
    with _opened(source, name) as (container, stream):
        for index, image in enumerate(_images(container, stream, set(wanted))):
            seen += 1
            while given < len(wanted) and wanted[given] == index:
                assert image is not None
                yield image
                given += 1
            if given == len(wanted):
                return
        raise VideoError(
            f"frame {wanted[given]} is not there: only {seen} frames can be decoded, fewer than the file says that it "
            "has; it is cut off or damaged"
        )


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ConfigError(f"video files are decoded by the package av, which is not installed: {INSTALL}") from error


@contextlib.contextmanager
def _opened(source: Any, name: str) -> Generator[tuple[Any, Any]]:
    """The container of a video file and the stream of its pictures."""
    av, called = _av(), describe(source, name)
    if not name and isinstance(source, str) and is_data(source):
        called = "a video in a data URI"
    try:
        with open_encoded(source, "video") as file:
            options = {"format_whitelist": ",".join(FORMATS)}
            try:
                container = av.open(file, options=options)
            except av.error.FFmpegError as error:
                kinds = "not a video file that is read, such as mp4, mov, mkv, webm or avi, or a damaged one"
                raise VideoError(f"{kinds} ({error.strerror})") from error
            with container:
                streams = [stream for stream in container.streams.video if not _is_cover(av, stream)]
                if not streams:
                    what = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                    raise VideoError(f"no video in it, only {what}")
                if streams[0].codec_context is None:
                    raise VideoError("its video is of a format that cannot be decoded here")
                streams[0].codec_context.options = {"max_pixels": str(MOST_PIXELS)}
                yield container, streams[0]
    except (ImageError, av.error.FFmpegError, OSError, ValueError) as error:
        what = f"it cannot be decoded ({error.strerror})" if isinstance(error, av.error.FFmpegError) else reason(error)
        raise VideoError(f"{called}: {what}") from error


def _is_cover(av: Any, stream: Any) -> bool:
    """Is it the picture of a record sleeve?"""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _check_claims(frames: int, width: int, height: int) -> None:
    if frames > MOST_FRAMES:
        raise VideoError(f"the header claims {frames:,} frames, expected at most {MOST_FRAMES:,}")
    if width * height > MOST_PIXELS:
        raise VideoError(f"frames of {width} x {height} pixels, expected at most {MOST_PIXELS:,} pixels")


def _images(container: Any, stream: Any, wanted: set[int] | None = None) -> Iterator[Any]:
    """Every frame in the order it is shown: an upright picture, or None where it is not wanted."""
    for index, frame in enumerate(container.decode(stream)):
        if wanted is not None and index not in wanted:
            yield None
            continue
        if frame.is_corrupt:
            raise VideoError(f"frame {index} is damaged")
        yield _upright(Image.fromarray(frame.to_ndarray(format="rgb24")), frame)


def _upright(image: Image.Image, frame: Any) -> Image.Image:
    """The picture as the file's display matrix says it is to be seen."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d, *_ = (int(n) for n in np.frombuffer(bytes(matrix), np.int32))
    signs = (_sign(a), _sign(b), _sign(c), _sign(d))
    if signs not in TURNS:
        raise VideoError(
            f"its frames are to be turned by {frame.rotation} degrees or stretched, expected quarter turns"
        )
    turn = TURNS[signs]
    return image if turn is None else image.transpose(turn)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _count(container: Any, stream: Any) -> int:
    """Shown frames of a file whose header does not say how many."""
    count, end = 0, 0.0
    for packet in container.demux():
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index and packet.size:
            # A VP8 packet may hold a frame that is only referred to (RFC 6386, 9.1: show_frame).
            count += stream.codec_context.name != "vp8" or bool(bytes(packet)[0] & 0x10)
    length = (container.duration or 0) / 1e6
    if end < CUT_OFF * length:
        raise VideoError(f"the file is cut off: its header says {length:.1f} s, and it ends after {end:.1f} s")
    if not count:
        raise VideoError("no frames")
    return count
