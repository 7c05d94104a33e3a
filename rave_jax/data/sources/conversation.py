"""Turns of a record as chat messages, its pictures put where they belong."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rave_jax.config import shown
from rave_jax.data.places import Place
from rave_jax.data.sample import Message, SampleError, message_text
from rave_jax.data.sources.keys import take
from rave_jax.data.sources.turns import Turn
from rave_jax.data.sources.visuals import own_visual

PLACEHOLDER = re.compile(r"<(image|video)>")
OTHER_PLACEHOLDER = re.compile(r"<img>[^<>\n]+\.(jpe?g|png|webp|bmp|gif|tiff?)</img>", re.IGNORECASE)
"""How Qwen-VL's first version named pictures in texts."""
PARTS = ("text", "image", "image_url", "video")
"""Kinds of parts of a message."""


def conversation(
    turns: Sequence[Turn], visuals: Sequence[Message], folder: Place, ignored: Collection[str] = ()
) -> tuple[Message, ...]:
    """Turns as chat messages, the record's pictures put where the texts have `<image>` or `<video>`.

    Placeholders count in questions and system messages; in an answer they are text. Pieces of text between placeholders
    lose the blanks around them, as in Qwen's fine-tuning code. A conversation with no placeholder at all gets its
    pictures in front of its first question. A part that names its own picture takes none of the record's.

    Args:
        turns: of `turns_of`.
        visuals: the parts of the record's pictures in order.
        folder: what paths in parts are relative to.
        ignored: keys of parts that may pass unread.

    Raises:
        SampleError: a part is not read, or the numbers of placeholders and pictures differ.
    """
    places = _Places(visuals, folder, ignored)
    messages = [places.message(turn) for turn in turns]
    if places.waiting and not places.found and not places.own:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            text = first["content"]
            rest = [{"type": "text", "text": text}] if isinstance(text, str) else list(text)
            first["content"] = [*places.waiting, *rest]
            places.waiting = []
    if places.waiting and places.own != list(
        visuals
    ):  # the same pictures may be listed beside the parts that name them
        own = f", and {len(places.own)} parts name pictures of their own" if places.own else ""
        raise SampleError(
            f"the record has {len(visuals)} pictures, but its texts have {places.found} placeholders{own}: write one "
            "<image> or <video> for each picture"
        )
    return tuple(messages)


class _Places:
    """Puts the pictures of one record into its messages.

    Attributes:
        waiting: pictures of the record that have no place yet.
        found: placeholders so far.
        own: pictures that parts name themselves.
    """

    def __init__(self, visuals: Sequence[Message], folder: Place, ignored: Collection[str]):
        self.waiting = list(visuals)
        self.found = 0
        self.own: list[Message] = []
        self._folder, self._ignored = folder, ignored

    def message(self, turn: Turn) -> dict[str, Any]:
        content = turn.content
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(texts, (list, tuple)) or not all(isinstance(part, Mapping) for part in texts):
            raise SampleError(f"content of a {turn.role} turn is {shown(content)}, expected a text or a list of parts")
        parts = [made for part in texts for made in self._parts(part, turn.role)]
        plain = len(parts) == 1 and parts[0]["type"] == "text"
        message = {"role": turn.role, "content": parts[0]["text"] if plain else parts}
        return message if turn.weight == 1 else {**message, "weight": turn.weight}

    def _parts(self, part: Mapping[str, Any], role: str) -> list[Message]:
        kind = _kind(part, role)
        if kind == "text":
            text = take(part, ("type", "text"), self._ignored, "a text part").get("text")
            if not isinstance(text, str):
                raise SampleError(f"the text of a {role} turn's part is {shown(text)}, expected a text")
            return [{"type": "text", "text": text}] if role == "assistant" else self._split(text)
        if role == "assistant":
            raise SampleError(f"an answer has a part of type {kind!r}; an answer can only be text")
        own = own_visual(kind, part, self._folder, self._ignored)
        if own is None:
            return [self._next(kind)]
        self.own.append(own)
        return [own]

    def _split(self, text: str) -> list[Message]:
        if other := OTHER_PLACEHOLDER.search(text):
            raise SampleError(
                f"a text names a picture as {shown(other[0])}: write <image> in its place and give the path "
                "under 'images'"
            )
        pieces = PLACEHOLDER.split(text)
        if len(pieces) == 1:
            return [{"type": "text", "text": text}]
        parts: list[Message] = []
        for number, piece in enumerate(pieces):
            if number % 2:
                parts.append(self._next(piece))
            elif piece.strip():
                parts.append({"type": "text", "text": piece.strip()})
        return parts

    def _next(self, kind: str) -> Message:
        self.found += 1
        for number, part in enumerate(self.waiting):
            if part["type"] == kind:
                return self.waiting.pop(number)
        other = "".join(f"; write <{part['type']}> for its {part['type']}" for part in self.waiting[:1])
        raise SampleError(f"there are more placeholders <{kind}> than {kind}s in the record{other}")


def _kind(part: Mapping[str, Any], role: str) -> str:
    """What a part is: its `type`, or the one kind it has a key of."""
    kind = part.get("type")
    if kind is None:
        keys = [key for key in PARTS if part.get(key) is not None]
        if len(keys) == 1:
            return keys[0]
    if not isinstance(kind, str) or kind not in PARTS:
        near = {"input_text": "text", "output_text": "text", "input_image": "image", "img": "image"}
        hint = f"; did you mean {near[kind]!r}?" if isinstance(kind, str) and kind in near else ""
        raise SampleError(f"part of type {shown(kind)} in a {role} turn: expected one of {', '.join(PARTS)}{hint}")
    return kind


def last_answer(messages: Sequence[Message]) -> tuple[str, ...]:
    """The last message's text as the one accepted answer; empty where the last message is no answer."""
    if not messages or messages[-1]["role"] != "assistant":
        return ()
    return (message_text(messages[-1]),)
