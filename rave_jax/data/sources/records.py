"""What sources share: records of a JSON file by index, and texts with picture placeholders as chat messages."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.data.sample import Message, SampleError

PLACEHOLDER = re.compile(r"<(image|video)>")
FRAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class JsonLines:
    """The objects of a JSON Lines file by index; only where lines start is held in memory.

    Raises:
        ConfigError: no such file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"{self.path}: no such file")
        self._starts, self._lengths, self._numbers = array("q"), array("q"), array("q")
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._starts.append(start)
                    self._lengths.append(len(line))
                    self._numbers.append(number)
                start += len(line)
        self._file = self.path.open("rb")

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """File and line of a record, for messages."""
        return f"{self.path}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        # pread keeps no position, so threads may read at once.
        line = os.pread(self._file.fileno(), self._lengths[index], self._starts[index])
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SampleError(f"{self.where(index)}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise SampleError(f"{self.where(index)}: {type(record).__name__}, expected an object")
        return record


class JsonList:
    """The objects of a JSON file that holds one list.

    Raises:
        ConfigError: no such file, or no list in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"{self.path}: no such file")
        try:
            self._records = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self.path}: not JSON: {error}") from error
        if not isinstance(self._records, list):
            raise ConfigError(f"{self.path}: holds {type(self._records).__name__}, expected a list of records")

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """File and record number, for messages."""
        return f"{self.path}[{index}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        if not isinstance(record, dict):
            raise SampleError(f"{self.where(index)}: {type(record).__name__}, expected an object")
        return record


def open_records(path: str | Path) -> JsonLines | JsonList:
    """Records of a `.jsonl` file, or of a JSON file that holds a list."""
    return JsonLines(path) if Path(path).suffix == ".jsonl" else JsonList(path)


def speaker(turn: Mapping[str, Any]) -> tuple[str, Any]:
    """Role and content of a turn written `{"from", "value"}` or `{"role", "content"}`.

    Raises:
        SampleError: an unknown speaker, or keys of neither style.
    """
    if not isinstance(turn, Mapping):
        raise SampleError(f"a turn is {type(turn).__name__}, expected an object")
    who, content = (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    if who not in SPEAKERS:
        raise SampleError(f"a turn by {who!r}: expected one of {', '.join(SPEAKERS)}")
    if content is None:
        raise SampleError(f"a turn by {who!r} without a text")
    return SPEAKERS[who], content


def conversation(turns: Sequence[Mapping[str, Any]], visuals: Sequence[Message]) -> tuple[Message, ...]:
    """Turns of a record as chat messages, its pictures put where the texts have `<image>` or `<video>`.

    Pieces of text between placeholders lose the blanks around them, as in Qwen's fine-tuning code. A conversation with
    no placeholder at all gets its pictures in front of its first question.

    Args:
        turns: `{"from", "value"}` or `{"role", "content"}`; a content may be text, or parts whose pictures are blank.
        visuals: the pictures' parts in order.

    Raises:
        SampleError: an unknown speaker, or as many placeholders as pictures are not there.
    """
    waiting = list(visuals)
    messages: list[dict[str, Any]] = []
    found = 0
    for turn in turns:
        role, content = speaker(turn)
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(texts, Sequence) or not all(isinstance(part, Mapping) for part in texts):
            raise SampleError(f"content of a {role} turn is {content!r}, expected a text or a list of parts")
        parts: list[Message] = []
        for part in texts:
            if part.get("type") in ("image", "video"):
                found += 1
                parts.append(_next(waiting, part["type"]))
                continue
            text = part.get("text") or ""
            pieces = PLACEHOLDER.split(text)
            if len(pieces) == 1:
                parts.append({"type": "text", "text": text})
                continue
            for number, piece in enumerate(pieces):
                if number % 2:
                    found += 1
                    parts.append(_next(waiting, piece))
                elif piece.strip():
                    parts.append({"type": "text", "text": piece.strip()})
        plain = len(parts) == 1 and parts[0]["type"] == "text"
        messages.append({"role": role, "content": parts[0]["text"] if plain else parts})
    if waiting and found == 0:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            text = first["content"]
            rest = [{"type": "text", "text": text}] if isinstance(text, str) else list(text)
            first["content"] = [*waiting, *rest]
            waiting = []
    if waiting:
        raise SampleError(f"{len(visuals)} pictures for {found} placeholders")
    return tuple(messages)


def _next(waiting: list[Message], kind: str) -> Message:
    for number, part in enumerate(waiting):
        if part["type"] == kind:
            return waiting.pop(number)
    raise SampleError(f"a placeholder <{kind}> without its {kind}")


def file_names(value: Any, folder: Path) -> list[str]:
    """Paths of a record's picture names: none, one, or a list of them.

    Raises:
        SampleError: not names.
    """
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SampleError(f"pictures are {value!r}, expected a name or a list of names")
    return [str(folder / name) for name in names]


def visual_parts(record: Mapping[str, Any], folder: Path) -> list[Message]:
    """The picture parts of a record: its `image` or `images`, then its `video` with `fps` where given.

    A video is a list of frames, or a folder whose pictures are its frames in the order of their names.

    Raises:
        SampleError: names that are none, or no such folder.
    """
    names = file_names(record.get("image", record.get("images")), folder)
    parts: list[Message] = [{"type": "image", "image": name} for name in names]
    video = record.get("video")
    if video is None:
        return parts
    frames = file_names(video, folder)
    if isinstance(video, str):
        if not Path(frames[0]).is_dir():
            raise SampleError(f"{frames[0]}: a video is a list of frames or a folder of them")
        frames = sorted(str(path) for path in Path(frames[0]).iterdir() if path.suffix.lower() in FRAMES)
    part = {"type": "video", "video": frames, "name": os.path.commonpath(frames) if frames else str(video)}
    return [*parts, {**part, "fps": record["fps"]} if "fps" in record else part]


def last_answer(messages: Sequence[Message]) -> tuple[str, ...]:
    """The last message's text as the one accepted answer; empty where the last message is no answer."""
    if not messages or messages[-1]["role"] != "assistant" or not isinstance(messages[-1]["content"], str):
        return ()
    return (messages[-1]["content"],)
