"""Conversations as they are handed to the commands: JSON in HF chat format, pictures by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rave_jax.checkpoint.hf_files import read_json
from rave_jax.config import ConfigError


def read_request(path: Path) -> list[dict[str, Any]]:
    """The messages of a request file, image paths made absolute.

    Raises:
        ConfigError: not a list of messages, or a picture that is not a local path.
    """
    return resolved(read_json(path), path.parent, str(path))


def resolved(data: Any, folder: Path, where: str) -> list[dict[str, Any]]:
    """Messages as they stand in JSON, image paths made absolute.

    A picture is given as `{"type": "image", "image": PATH}` or, as HF also has it, under `path` or `url`; a video as
    `{"type": "video", "video": [PATH of each frame], "fps": NUMBER}`.

    Args:
        data: what was read.
        folder: what paths are relative to.
        where: what errors call the request.

    Raises:
        ConfigError: not a list of messages, or a picture that is not a local path.
    """
    if not isinstance(data, list) or not data or not all(isinstance(m, dict) and "content" in m for m in data):
        raise ConfigError(f"{where}: expected a JSON list of messages, each with 'role' and 'content'")
    return [message | {"content": _content(message["content"], folder, where)} for message in data]


def question(text: str, pictures: tuple[Any, ...]) -> dict[str, Any]:
    """What a user asks, pictures before the text."""
    if not pictures:  # plain, for templates of text models that know no parts
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _content(content: Any, folder: Path, where: str) -> Any:
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            given = next((part[key] for key in ("image", "path", "url") if key in part), None)
            parts.append({"type": "image", "image": _local(given, folder, where)})
        elif kind == "video":
            frames = part.get("video")
            if not isinstance(frames, list):
                raise ConfigError(f"{where}: video is {frames!r}, expected a list of paths, one per frame")
            parts.append(part | {"video": [_local(frame, folder, where) for frame in frames]})
        elif kind == "text" and not isinstance(part.get("text"), str):
            raise ConfigError(f"{where}: a text part's text is {part.get('text')!r}, expected a string")
        else:
            parts.append(part)
    return parts


def _local(given: Any, folder: Path, where: str) -> str:
    text = given.removeprefix("file://") if isinstance(given, str) else given
    if not isinstance(text, str) or "://" in text or text.startswith("data:"):
        raise ConfigError(f"{where}: a picture is given as {str(given)[:100]!r}, expected the path of a local file")
    return str(folder.resolve() / text)
