"""Conversations as they are handed to the commands: JSON in HF chat format, pictures by path. Nothing passes unread."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rave_jax.config import ConfigError, shown
from rave_jax.data.opening import is_address, is_data
from rave_jax.data.sources.files import parse
from rave_jax.files import read_bytes
from rave_jax.tools.folder import PictureFolder

MESSAGE_KEYS = ("role", "content")
PART_KEYS = {
    "text": ("type", "text"),
    "image": ("type", "image", "path", "url"),
    "image_url": ("type", "image_url"),
    "video": ("type", "video", "path", "url", "fps"),
}
"""Kinds of message parts, and the keys of each."""


def read_request(path: Path, image_dir: Path | None = None) -> list[dict[str, Any]]:
    """The messages of a request file, image paths made absolute.

    Args:
        path: of the file; image paths are relative to it.
        image_dir: the folder that pictures must lie below; None is that of the file.

    Raises:
        ConfigError: no regular file, not a list of messages, or a picture that is no file below the folder.
    """
    try:
        data = parse(read_bytes(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    return resolved(data, PictureFolder.of(path.parent, image_dir), f"{path}: messages")


def resolved(data: Any, folder: PictureFolder, where: str) -> list[dict[str, Any]]:
    """Messages as they stand in JSON, image paths made absolute.

    A picture is given as `{"type": "image", "image": PATH}` or, as HF also has it, under `path` or `url`, or as
    `{"type": "image_url", "image_url": {"url": PATH}}`; a video as `{"type": "video", "video": PATH}`, also under
    `path` or `url`, or as `{"type": "video", "video": [PATH of each frame], "fps": NUMBER}`. A data: URI may stand in
    place of a path.

    Args:
        data: what was read.
        folder: where pictures may lie.
        where: what errors call the list.

    Raises:
        ConfigError: not a list of messages; a key or a kind of part that is not read; a picture that is no file below
            the folder.
    """
    if not isinstance(data, list) or not data or not all(isinstance(m, dict) and "content" in m for m in data):
        raise ConfigError(f"{where}: expected a JSON list of messages, each with 'role' and 'content'")
    messages = []
    for number, message in enumerate(data):
        here = f"{where}[{number}]"
        _check_keys(message, MESSAGE_KEYS, here, "a message")
        messages.append({"role": message.get("role"), "content": _content(message["content"], folder, here)})
    return messages


def question(text: str, pictures: tuple[Any, ...], videos: tuple[Any, ...] = ()) -> dict[str, Any]:
    """What a user asks, pictures and then videos before the text."""
    if not pictures and not videos:  # plain, for templates of text models that know no parts
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    parts += [{"type": "video", "video": video} for video in videos]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _check_keys(given: Mapping[str, Any], read: Collection[str], where: str, what: str) -> None:
    """Refuse a key that is not read and holds something."""
    for key, value in given.items():
        if key not in read and value not in (None, "", [], {}):
            raise ConfigError(f"{where}: the key {shown(key)} of {what} is not read{meant(key, read)}")


def meant(key: str, known: Collection[str]) -> str:
    """The end of an error: which name may be meant, or which there are."""
    close = difflib.get_close_matches(key[:80], known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected {', '.join(known)}"


def _content(content: Any, folder: PictureFolder, where: str) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError(f"{where}.content is {shown(content)}, expected a text or a list of parts")
    return [_part(part, folder, f"{where}.content[{number}]") for number, part in enumerate(content)]


def _part(part: Any, folder: PictureFolder, where: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ConfigError(f'{where} is {shown(part)}, expected a part such as {{"type": "text", "text": ...}}')
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in PART_KEYS:
        hint = meant(kind, PART_KEYS) if isinstance(kind, str) else f"; expected {', '.join(PART_KEYS)}"
        raise ConfigError(f"{where}: a part of type {shown(kind)} is not read{hint}")
    _check_keys(part, PART_KEYS[kind], where, f"a part of type {kind!r}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ConfigError(f"{where}: a text part's text is {shown(part.get('text'))}, expected a string")
        return {"type": "text", "text": part["text"]}
    if kind == "video":
        video = _given(part, where)
        if isinstance(video, list):
            video = [_picture(frame, folder, f"{where}.video[{number}]") for number, frame in enumerate(video)]
        else:
            video = _picture(video, folder, where, "video")
        return {"type": "video", "video": video} | ({"fps": part["fps"]} if part.get("fps") is not None else {})
    return {"type": "image", "image": _picture(_given(part, where), folder, where)}


def _given(part: Mapping[str, Any], where: str) -> Any:
    """What an image or video part names as its picture or video."""
    kind, what = part["type"], "video" if part["type"] == "video" else "picture"
    keys = [key for key in ("image", "video", "path", "url", "image_url") if part.get(key) is not None]
    if len(keys) != 1:
        found = f"under {' and '.join(map(repr, keys))}" if keys else "under none of its keys"
        expected = "'image_url'" if kind == "image_url" else f"{kind!r}, 'path' or 'url'"
        raise ConfigError(f"{where}: the part names a {what} {found}, expected it under one of {expected}")
    given = part[keys[0]]
    if keys == ["image_url"] and isinstance(given, dict):
        # `detail` asks OpenAI's models for a size; here a picture keeps its own.
        _check_keys(given, ("url", "detail"), where, "image_url")
        return given.get("url")
    return given


def _picture(given: Any, folder: PictureFolder, where: str, what: str = "picture") -> str:
    """The absolute path of a picture or video file, or its data: URI."""
    if not isinstance(given, str):
        expected = "the path of a file or a data: URI" + (", or a list of frames" if what == "video" else "")
        raise ConfigError(f"{where}: a {what} is {shown(given)}, expected {expected}")
    if is_data(given):
        return given
    path = given.removeprefix("file://")
    if not path.strip():
        raise ConfigError(f"{where}: the path of a {what} is empty")
    if is_address(path):
        raise ConfigError(
            f"{where}: {shown(given)} is a URL: {what}s are not downloaded; save it below "
            f"{folder.root} and give its path"
        )
    try:
        return folder.find(path)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
