"""Pictures and videos of a record: under their own keys, in the parts of a message, as paths, bytes or data URIs."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rave_jax.config import shown
from rave_jax.data.opening import LONGEST_PATH, from_data_uri, is_address, is_data
from rave_jax.data.places import Place, inside, scheme_of
from rave_jax.data.sample import Message, SampleError
from rave_jax.data.sources.keys import is_empty, take

FRAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
IMAGE_KEYS = ("image", "images")
VIDEO_KEYS = ("video", "videos", "fps")
FORMS = ("bytes", "path", "url")
"""What an object may give a picture as; the first of them that holds something counts."""


def picture(value: Any, folder: Place, name: str = "") -> Message:
    """An image part of what a record gives as a picture.

    Args:
        value: path, file:// or data: URI, encoded bytes, or an object with `bytes`, `path` or `url`.
        folder: what paths are relative to.
        name: what errors call a picture that has no path.

    Raises:
        SampleError: none of these.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in FORMS if not is_empty(value.get(key))), value)
    if isinstance(value, bytes) and value:
        return {"type": "image", "image": value, "name": name or "a picture in the record"}
    if isinstance(value, str) and is_data(value):
        return {"type": "image", "image": from_data_uri(value), "name": name or "a picture in a data URI"}
    return {"type": "image", "image": local_path(value, folder, "a picture")}


def local_path(value: Any, folder: Place, what: str) -> str:
    """The path of a local file.

    Raises:
        SampleError: an address on the net, an empty text, or no text at all.
    """
    if not isinstance(value, str):
        raise SampleError(f"{what} is {shown(value)}, expected a path or a data URI")
    text = value.removeprefix("file://")
    if not text.strip():
        raise SampleError(f"{what} is {value!r}: expected a path; leave the key out of a record without a picture")
    if is_address(text) and not scheme_of(text):
        raise SampleError(f"{what} is {shown(value)}; files are not downloaded: save it and give its path")
    if len(text) > LONGEST_PATH:
        raise SampleError(
            f"{what} is a text of {len(text)} characters, which is too long for a path; write base64 as "
            "data:image/png;base64,..."
        )
    return inside(folder, text)


def video(value: Any, fps: Any, folder: Place, name: str = "") -> Message:
    """A video part: a video file, a list of frames, or a folder whose pictures are its frames in the order of their
    names.

    Args:
        value: path, file:// or data: URI, the bytes of a file, an object with `bytes`, `path` or `url`, or a list of
            what `picture` takes.
        fps: how many of the frames a second holds; None if not given. A file says it itself.
        folder: what paths are relative to.
        name: what errors call a file that has no path.

    Raises:
        SampleError: none of these, or a folder without pictures.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in FORMS if not is_empty(value.get(key))), value)
    given: Any
    if isinstance(value, bytes) and value:
        given, called = value, name or "a video in the record"
    elif isinstance(value, str) and is_data(value):
        if value[5:].lower().startswith("image/"):
            raise SampleError(f"a video is {shown(value)}: this data URI is one picture; a video is a list of frames")
        given, called = from_data_uri(value), name or "a video in a data URI"
    elif isinstance(value, str):
        given = called = local_path(value, folder, "a video")
        if os.path.isdir(given):
            given = _frames_in(Path(given))
    elif isinstance(value, list) and value:
        given = [picture(frame, folder)["image"] for frame in value]
        paths = [frame for frame in given if isinstance(frame, str)]
        called = os.path.commonpath(paths) if len(paths) == len(given) and _alike(paths) else "a video"
    else:
        raise SampleError(f"a video is {shown(value)}, expected a video file, a folder of frames or a list of them")
    part = {"type": "video", "video": given, "name": called}
    return part if fps is None else {**part, "fps": fps}


def _frames_in(folder: Path) -> list[str]:
    """The pictures of a folder in the order of their names."""
    try:
        frames = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in FRAMES)
    except OSError as error:
        raise SampleError(f"{shown(str(folder))}: the frames of a video cannot be listed: {error}") from error
    if not frames:
        raise SampleError(f"{folder}: this folder of a video holds no picture ({', '.join(FRAMES)})")
    return frames


def _alike(paths: list[str]) -> bool:
    return len({os.path.isabs(path) for path in paths}) == 1


def own_visual(kind: str, part: Mapping[str, Any], folder: Place, ignored: Collection[str]) -> Message | None:
    """The picture or video that a message's part names itself; None where it is one of the record's own.

    Raises:
        SampleError: what it names is none, or it has a key that is not read.
    """
    if kind == "video":
        given = take(part, ("type", "video", "path", "url", "fps"), ignored, "a video part")
        found = [key for key in ("video", "path", "url") if key in given]
        if len(found) > 1:
            raise SampleError(f"a video part names a video under {' and '.join(map(repr, found))}; keep one of them")
        return video(given[found[0]], given.get("fps"), folder) if found else None
    given = take(part, ("type", "image", "path", "url", "image_url"), ignored, f"an {kind} part")
    found = [key for key in ("image", "path", "url", "image_url") if key in given]
    if len(found) > 1:
        raise SampleError(f"an image part names a picture under {' and '.join(map(repr, found))}; keep one of them")
    if not found:
        if kind == "image_url":
            raise SampleError("an image_url part without the key 'image_url'")
        return None
    value = given[found[0]]
    if isinstance(value, Mapping) and found[0] == "image_url":
        value = take(value, ("url",), ignored, "an image_url").get("url", value)
    return picture(value, folder)


def visual_parts(record: Mapping[str, Any], folder: Place, where: str = "") -> list[Message]:
    """The picture parts of a record: its `image` or `images`, then its `video` or `videos` with `fps` where given.

    A picture is what `picture` takes, and a video what `video` takes. `videos` is a list of videos, `fps` then one
    number or one for each.

    Raises:
        SampleError: values that are none of these.
    """
    images = [record[key] for key in IMAGE_KEYS if not _is_none(record.get(key))]
    if len(images) > 1 and images[0] != images[1] and [images[0]] != images[1]:
        raise SampleError("'image' and 'images' hold different pictures: keep one of them")
    values = [] if not images else images[0] if isinstance(images[0], list) else [images[0]]
    if isinstance(images[0] if images else "", (bool, int, float)):
        raise SampleError(f"pictures are {shown(images[0])}, expected a path or a list of paths")
    parts = [picture(value, folder, f"{where} image {number}".strip()) for number, value in enumerate(values)]
    return [*parts, *_videos(record, folder, where)]


def _is_none(value: Any) -> bool:
    """Is it no picture at all? A table has an object without bytes and path where a row has none."""
    if isinstance(value, Mapping):
        return all(key in FORMS and is_empty(held) for key, held in value.items())
    return value is None or value == []


def _videos(record: Mapping[str, Any], folder: Place, where: str) -> list[Message]:
    one, many, fps = (record.get(key) for key in VIDEO_KEYS)
    if not _is_none(one) and not _is_none(many):
        raise SampleError("'video' and 'videos' both hold videos: keep one of them")
    if many is not None and not isinstance(many, list):
        raise SampleError(f"videos is {shown(many)}, expected a list of videos")
    videos = many or [] if _is_none(one) else [one]
    if fps is not None and not videos:
        raise SampleError("'fps' is given but no video: add the video or leave 'fps' out")
    rates = fps if isinstance(fps, list) else [fps] * len(videos)
    if len(rates) != len(videos):
        raise SampleError(f"fps has {len(rates)} numbers for {len(videos)} videos")
    return [
        video(value, rate, folder, f"{where} video {number}".strip())
        for number, (value, rate) in enumerate(zip(videos, rates, strict=True))
    ]
