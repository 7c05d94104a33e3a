"""Small video files for tests, written by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

MPEG4 = "mpeg4"


def film(
    path: Path,
    frames: int = 12,
    rate: int = 6,
    size: tuple[int, int] = (48, 64),
    *,
    codec: str = MPEG4,
    matrix: Sequence[int] | None = None,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A video whose frames all differ: a white column moves right, over a red corner at the top left.

    Args:
        path: the ending says which container.
        frames: how many.
        rate: of a second.
        size: (height, width).
        codec: of FFmpeg.
        matrix: a, b, c and d of the display matrix.
        times: when each frame is shown, in units of 1 / rate; one after another where not given.
        options: of the container.
    """
    height, width = size
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        if matrix is not None:
            a, b, c, d = (n << 16 for n in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        container.start_encoding()
        for number in range(frames):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[: height // 3, : width // 4] = (255, 0, 0)
            pixels[:, number * 2 % width] = 255
            pixels[-8:, -8:] = number * 9 % 256
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    """A file with nothing but sound."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(path: Path) -> list[np.ndarray]:
    """Every frame as PyAV's rgb24."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
