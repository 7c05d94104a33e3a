"""Videos that are written as text between pictures: their placeholders are replaced in what a template renders.

The text of such a video and the text around it become tokens together, as a tokenizer may join the two.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rave_jax.data.marks import PRIVATE, Marked
from rave_jax.data.sample import Message, SampleError
from rave_jax.data.template import Rendered


class VideoText(NamedTuple):
    """How videos are written.

    Fields:
        placeholder: what the template writes for each.
        spelled: a video part to the text that takes its place.
    """

    placeholder: str
    spelled: Callable[[Message], str]


def videos_of(messages: Sequence[Message]) -> list[Message]:
    """The video parts of messages whose form is known to be right, in order."""
    contents = (message["content"] for message in messages)
    return [part for content in contents if not isinstance(content, str) for part in content if part["type"] == "video"]


def spell_videos(
    rendered: Rendered, marked: Marked, placeholder: str, texts: Sequence[str], literal: bool = True
) -> Rendered:
    """The rendered conversation with a text in place of each placeholder.

    Args:
        rendered: the conversation with its marks.
        marked: says which marks stand around texts.
        placeholder: what is replaced.
        texts: in place of each.
        literal: is a placeholder that a message spells out text like any other? Else it counts as one.

    Raises:
        SampleError: there are not as many placeholders as texts.
    """
    opens, closes = (set(itertools.chain(*marks)) for marks in (marked.opens, marked.closes))
    places, inside = [], 0
    for match in re.finditer(f"{re.escape(placeholder)}|{PRIVATE.pattern}", rendered.text):
        inside += (match[0] in opens) - (match[0] in closes)
        if match[0] == placeholder and not (inside and literal):
            places.append(match.start())
    if len(places) != len(texts):
        raise SampleError(
            f"the rendered text has {len(places)} placeholders {placeholder!r}, but the conversation has {len(texts)} "
            "videos; does the chat template write one for each, and does a message spell one out?"
        )
    pieces, cursor = [], 0
    for place, text in zip(places, texts, strict=True):
        pieces += [rendered.text[cursor:place], text]
        cursor = place + len(placeholder)

    def moved(at: int) -> int:
        return at + sum(len(text) - len(placeholder) for place, text in zip(places, texts, strict=True) if place < at)

    answers = tuple((moved(start), moved(stop)) for start, stop in rendered.answers)
    return Rendered("".join([*pieces, rendered.text[cursor:]]), answers)
