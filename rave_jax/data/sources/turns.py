"""A record's turns in the shapes that data sets write them in, with its name and answers.

Shapes, one to a record:

- `conversations` or `messages`: turns `{"from", "value"}` (LLaVA, ShareGPT) or `{"role", "content"}` (OpenAI, HF);
- `texts`: turns `{"user", "assistant"}` (The Cauldron);
- `instruction` with `output`, and perhaps `input` below the instruction and `history` before it (Alpaca), or `query`
  with `response` and perhaps `history`.

A record's own `system` stands before them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from rave_jax.config import shown
from rave_jax.data.sample import SampleError
from rave_jax.data.sources.keys import is_empty, take
from rave_jax.data.sources.visuals import IMAGE_KEYS, VIDEO_KEYS

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
        raise SampleError(f"{' and '.join(map(repr, found))} both hold turns: add one of them to `ignored`")
    if found[0] in PAIRS:
        turns = _instruction(record, found[0])
    else:
        unread = [key for key in (*PAIRS.values(), "input", "history") if not is_empty(record.get(key))]
        if unread:
            raise SampleError(f"{found[0]!r} holds the turns, so {unread[0]!r} is not read: add it to `ignored`")
        given = _rows(record[found[0]])
        if not isinstance(given, (list, tuple)) or not given:
            raise SampleError(f"no turns found: {found[0]!r} is {shown(given)}, expected a list of turns")
        turns = [made for turn in given for made in _turns(turn, ignored)]
    return _with_system(record, turns)


def _rows(turns: Any) -> Any:
    """Turns of a table that `datasets` keeps by columns, `{"from": [...], "value": [...]}`; others as they are."""
    if not isinstance(turns, Mapping) or not all(isinstance(column, list) for column in turns.values()):
        return turns
    if len({len(column) for column in turns.values()}) != 1:
        return turns
    return [dict(zip(turns, row, strict=True)) for row in zip(*turns.values(), strict=True)]


def _turns(turn: Any, ignored: Collection[str]) -> list[Turn]:
    if isinstance(turn, Mapping) and turn.get("user") is not None and turn.get("role") is None:
        pair = take(turn, ("user", "assistant"), ignored, "a turn")
        if len(pair) < 2:
            raise SampleError(f"a turn has only {', '.join(map(repr, pair))}, expected both 'user' and 'assistant'")
        return [Turn("user", pair["user"]), Turn("assistant", pair["assistant"])]
    return [_turn(turn, ignored)]


def _turn(turn: Any, ignored: Collection[str]) -> Turn:
    if not isinstance(turn, Mapping):
        raise SampleError(f"a turn is {type(turn).__name__}, expected an object")
    who_key, content_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
    who = turn.get(who_key)
    if not isinstance(who, str) or who not in SPEAKERS:
        raise SampleError(f"the role of a turn is {shown(who)}, expected one of {', '.join(SPEAKERS)}{_of_role(who)}")
    role = SPEAKERS[who]
    given = take(turn, (who_key, content_key, "weight", "loss", "train"), ignored, f"a turn by {who!r}")
    if content_key not in given:
        raise SampleError(f"a turn by {who!r} has no text: write it under {content_key!r}")
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
        raise SampleError(f"{key!r} is answered by {answer!r}, so {unread[0]!r} is not read: add it to `ignored`")
    if answer not in record:
        raise SampleError(f"the record has {key!r} but no {answer!r}: add the answer")
    texts = [record[key], record.get("input", "") if key == "instruction" else "", record[answer]]
    for name, text in zip((key, "input", answer), texts, strict=True):
        if not isinstance(text, str):
            raise SampleError(f"{name} is {shown(text)}, expected a text")
    history = [] if is_empty(record.get("history")) else record["history"]
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
        expected = "a list of texts" if name == "answers" else "a text, a number or a list of texts"
        raise SampleError(f"{name} is {shown(value)}, expected {expected}")
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
