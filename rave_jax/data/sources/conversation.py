"""A record's turns as chat messages: the shapes that data sets write them in, and pictures put where they belong.

Shapes, one to a record:

- `conversations` or `messages`: turns `{"from", "value"}` (LLaVA, ShareGPT) or `{"role", "content"}` (OpenAI, HF);
- `texts`: turns `{"user", "assistant"}` (The Cauldron);
- `instruction` with `output`, and perhaps `input` below the instruction and `history` before it (Alpaca), or `query`
  with `response` and perhaps `history`.

A record's own `system` stands before them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rave_jax.data.sample import Message, SampleError, message_text
from rave_jax.data.sources.keys import is_empty, shown, take
from rave_jax.data.sources.visuals import IMAGE_KEYS, VIDEO_KEYS, own_visual

PLACEHOLDER = re.compile(r"<(image|video)>")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
TURNS = ("conversations", "messages", "texts")
PAIRS = {"instruction": "output", "query": "response"}
"""A question's key and its answer's."""
SYSTEM = ("system", "system_prompt")
RECORD_KEYS: tuple[str, ...] = (
    "id",
    *IMAGE_KEYS,
    *VIDEO_KEYS,
    *SYSTEM,
    *TURNS,
    *PAIRS,
    *PAIRS.values(),
    "input",
    "history",
)
"""Every key of a record that is read."""
PARTS = ("text", "image", "image_url", "video")
"""Kinds of parts of a message."""
MOST_WEIGHT, LEAST_WEIGHT = 1e6, 1e-6


class Turn(NamedTuple):
    """One turn: `role` of a message, `content` as it stands in the record, `weight` of an answer in the loss."""

    role: str
    content: Any
    weight: float = 1.0


def check_turns(record: Mapping[str, Any]) -> None:
    """Raise SampleError, saying what the record holds, unless it has a key of turns."""
    if not any(record.get(key) is not None for key in (*TURNS, *PAIRS)):
        raise SampleError(
            f"no turns found: the record has the keys {', '.join(map(shown, record)) or 'none'}; expected "
            "'conversations' or 'messages' with a list of turns, or 'instruction' with 'output' (QaJsonl reads "
            "'question' and 'answers')"
        )


def turns_of(record: Mapping[str, Any], ignored: Collection[str] = ()) -> list[Turn]:
    """The turns of a record in whichever shape they are.

    Raises:
        SampleError: no shape or several, an unknown speaker, or a key that is not read.
    """
    check_turns(record)
    present = [key for key in (*TURNS, *PAIRS) if key in record]
    found = [key for key in present if not is_empty(record[key])] or present[:1]
    if len(found) > 1:
        raise SampleError(f"{' and '.join(map(repr, found))} both hold turns: name one of them in `ignored`")
    if found[0] in PAIRS:
        turns = _instruction(record, found[0])
    else:
        unread = [key for key in (*PAIRS.values(), "input", "history") if not is_empty(record.get(key))]
        if unread:
            raise SampleError(f"{found[0]!r} holds the turns, so {unread[0]!r} is not read: name it in `ignored`")
        given = record[found[0]]
        if not isinstance(given, (list, tuple)) or not given:
            raise SampleError(f"no turns found: {found[0]!r} is {shown(given)}, expected a list of turns")
        turns = [made for turn in given for made in _turns(turn, ignored)]
    return _with_system(record, turns)


def _turns(turn: Any, ignored: Collection[str]) -> list[Turn]:
    if isinstance(turn, Mapping) and "user" in turn and "role" not in turn:
        pair = take(turn, ("user", "assistant"), ignored, "a turn")
        if len(pair) < 2:
            raise SampleError(f"a turn has {', '.join(map(repr, pair))} alone, expected 'user' and 'assistant'")
        return [Turn("user", pair["user"]), Turn("assistant", pair["assistant"])]
    return [_turn(turn, ignored)]


def _turn(turn: Any, ignored: Collection[str]) -> Turn:
    if not isinstance(turn, Mapping):
        raise SampleError(f"a turn is {type(turn).__name__}, expected an object")
    who_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    who = turn.get(who_key)
    if not isinstance(who, str) or who not in SPEAKERS:
        raise SampleError(f"a turn by {shown(who)}: expected one of {', '.join(SPEAKERS)}{_of_role(who)}")
    role = SPEAKERS[who]
    given = take(turn, (who_key, content_key, "weight", "loss", "train"), ignored, f"a turn by {who!r}")
    if content_key not in given:
        raise SampleError(f"a turn by {who!r} without a text: expected it under {content_key!r}")
    return Turn(role, given[content_key], _weight(given, role))


def _of_role(who: object) -> str:
    if who in ("tool", "function", "function_call", "observation", "ipython"):
        return "; tool calls are not supported"
    return "; did you mean 'system'?" if who == "developer" else ""


def _weight(turn: Mapping[str, Any], role: str) -> float:
    """What an answer counts in the loss: its `weight`, or 0 or 1 by its `loss` (or `train`)."""
    said = [key for key in ("weight", "loss", "train") if key in turn]
    if not said:
        return 1.0
    if len(said) > 1:
        raise SampleError(f"a turn has {' and '.join(map(repr, said))}: keep one of them")
    key, value = said[0], turn[said[0]]
    if key == "weight":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT):
            raise SampleError(
                f"weight is {shown(value)}, expected 0 or a number from {LEAST_WEIGHT} to {MOST_WEIGHT:g}"
            )
    elif value not in (True, False):
        raise SampleError(f"{key} is {shown(value)}, expected true or false")
    if role != "assistant" and value:
        raise SampleError(f"{key} of a {role} turn is {value!r}: only answers are learned; leave it out or set it to 0")
    return float(value) if role == "assistant" else 1.0


def _instruction(record: Mapping[str, Any], key: str) -> list[Turn]:
    """An instruction with the input below it, after its history, as LLaMA-Factory joins them."""
    answer = PAIRS[key]
    unread = [other for other in PAIRS.values() if other != answer and not is_empty(record.get(other))]
    if key == "query" and not is_empty(record.get("input")):
        unread.append("input")
    if unread:
        raise SampleError(f"{key!r} is answered by {answer!r}, so {unread[0]!r} is not read: name it in `ignored`")
    if answer not in record:
        raise SampleError(f"{key!r} without its {answer!r}")
    texts = [record[key], record.get("input", "") if key == "instruction" else "", record[answer]]
    for name, text in zip((key, "input", answer), texts, strict=True):
        if not isinstance(text, str):
            raise SampleError(f"{name} is {shown(text)}, expected a text")
    history = record.get("history", [])
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    if not pairs:
        raise SampleError(f"history is {shown(history)}, expected a list of pairs [question, answer]")
    before = [turn for ask, reply in history for turn in (Turn("user", ask), Turn("assistant", reply))]
    return [*before, Turn("user", "\n".join(text for text in texts[:2] if text)), Turn("assistant", texts[2])]


def _with_system(record: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    found = [record[key] for key in SYSTEM if not is_empty(record.get(key))]
    for text in found:
        if not isinstance(text, str):
            raise SampleError(f"system is {shown(text)}, expected a text")
    if turns and turns[0].role == "system":
        found.append(turns[0].content)
        turns = turns[1:]
    if not found:
        return turns
    if any(text != found[0] for text in found):
        raise SampleError("the record's 'system' and its first turn are different system messages: keep one of them")
    return [Turn("system", found[0]), *turns]


def conversation(
    turns: Sequence[Turn], visuals: Sequence[Message], folder: Path, ignored: Collection[str] = ()
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
        SampleError: a part that is not read, or as many placeholders as pictures are not there.
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
        raise SampleError(f"{len(visuals)} pictures for {places.found} placeholders{own}")
    return tuple(messages)


class _Places:
    """Puts the pictures of one record into its messages.

    Attributes:
        waiting: pictures of the record that have no place yet.
        found: placeholders so far.
        own: pictures that parts name themselves.
    """

    def __init__(self, visuals: Sequence[Message], folder: Path, ignored: Collection[str]):
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
            raise SampleError(f"an answer has a part of type {kind!r}: an answer is text")
        own = own_visual(kind, part, self._folder, self._ignored)
        if own is None:
            return [self._next(kind)]
        self.own.append(own)
        return [own]

    def _split(self, text: str) -> list[Message]:
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
        raise SampleError(f"a placeholder <{kind}> without its {kind}")


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


def answer_texts(value: Any, name: str = "answers") -> tuple[str, ...]:
    """Accepted answers: a text, or a list of texts and numbers; `answer` alone may be a number too.

    Raises:
        SampleError: anything else, which would be trained as Python writes it.
    """
    if value is None:
        return ()
    if isinstance(value, str) or (name == "answer" and is_number(value)):
        return (str(value),)
    if not isinstance(value, list):
        raise SampleError(f"{name} is {shown(value)}, expected a list of texts")
    for number, answer in enumerate(value):
        if not isinstance(answer, str) and not is_number(answer):
            raise SampleError(f"{name}.{number} is {shown(answer)}, expected a text or a number")
    return tuple(str(answer) for answer in value)


def is_number(value: object) -> bool:
    """Is it a finite number, and no truth value?"""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    # An integer of more digits than Python writes out is no answer.
    return abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)


def record_id(record: Mapping[str, Any], index: int) -> str:
    """Name of a record: its `id`, or its number.

    Raises:
        SampleError: an id that is neither a text nor a number.
    """
    found = record.get("id")
    if found is None:
        return str(index)
    if not isinstance(found, str) and not is_number(found):
        raise SampleError(f"id is {shown(found)}, expected a text or a number")
    return str(found)


def last_answer(messages: Sequence[Message]) -> tuple[str, ...]:
    """The last message's text as the one accepted answer; empty where the last message is no answer."""
    if not messages or messages[-1]["role"] != "assistant":
        return ()
    return (message_text(messages[-1]),)
