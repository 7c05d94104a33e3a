"""Private marks around the texts of a conversation, by which they are found again in what a template renders.

Templates trim texts, split them and move them about; a mark goes with its text. Marks stand inside the outer spaces of
a text, so that trimming finds the spaces that it would find without them.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rave_jax.data.literal import LiteralTokenizer
from rave_jax.data.sample import SampleError
from rave_jax.typing import Int, NpArray

FIRST, LAST = 0x100000, 0x10FFFD
"""Private characters (Unicode plane 16) that marks are taken from."""
PRIVATE = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")
View = Mapping[str, Any]
"""A message as a template sees it."""


class Marked(NamedTuple):
    """A conversation with marks.

    Fields:
        views: its messages.
        opens, closes: for each message, the marks before and behind its texts.
        heads, tails: for each message, the spaces that begin its first text and end its last, outside of the marks.
        typed: private characters for special tokens that a text spells out, and how they are spelled.
    """

    views: list[View]
    opens: list[list[str]]
    closes: list[list[str]]
    heads: list[str]
    tails: list[str]
    typed: dict[str, str]


class Scanned(NamedTuple):
    """A rendered text without its marks.

    Fields:
        text: special tokens that the template wrote are one private character each; those that were typed are spelled.
        written: special tokens are spelled, whoever wrote them: the text as the template renders it without marks.
        at: where each mark stood in `text`.
        shift: (positions in `text` behind a special token, how much longer `written` is up to there).
        origin: (position in what was rendered, position in `text`, characters of `text`) of each piece of it.
        typed: are there special tokens that the template did not write?
    """

    text: str
    written: str
    at: dict[str, list[int]]
    shift: tuple[Int[NpArray, "N"], Int[NpArray, "N"]]
    origin: list[tuple[int, int, int]]
    typed: bool

    def first(self, marks: Iterable[str]) -> int | None:
        """Where the first of these marks stands."""
        found = [place for mark in marks for place in self.at.get(mark, ())]
        return min(found, default=None)

    def last(self, marks: Iterable[str]) -> int | None:
        """Where the last of these marks stands."""
        found = [place for mark in marks for place in self.at.get(mark, ())]
        return max(found, default=None)

    def in_text(self, place: int) -> int:
        """A position of what was rendered as one of `text`."""
        rendered, start, length = self.origin[max(bisect.bisect_right(self.origin, (place, len(self.text))) - 1, 0)]
        return start + min(place - rendered, length)

    def in_written(self, places: Sequence[int]) -> Int[NpArray, "N"]:
        """Positions of `text` as positions of `written`."""
        behind, longer = self.shift
        found = np.asarray(places, np.int64)
        return found + np.concatenate([[0], longer])[np.searchsorted(behind, found, side="right")]


def mark(views: Sequence[View], tokenizer: LiteralTokenizer, literal: bool, around: bool = True) -> Marked:
    """The conversation with marks.

    Args:
        views: its messages.
        tokenizer: knows the special tokens.
        literal: also put a private character for each special token that a text spells out.
        around: put marks around texts.

    Raises:
        SampleError: it has more texts than there are marks.
    """
    texts = [text for view in views for text in texts_of(view)]
    free = _free(texts)
    spelled = sorted({token for text in texts for token in tokenizer.found(text)}) if literal else []
    typed = {token: next(free) for token in spelled}
    opens: list[list[str]] = []
    closes: list[list[str]] = []

    def marked(text: str) -> str:
        words = tokenizer.replaced(text, typed) if typed else text
        if not around:
            return words
        opens[-1].append(next(free))
        closes[-1].append(next(free))
        core = words.strip()
        start = len(words) - len(words.lstrip()) if core else len(words)
        return f"{words[:start]}{opens[-1][-1]}{core}{closes[-1][-1]}{words[start + len(core) :]}"

    marked_views: list[View] = []
    for view in views:
        opens.append([])
        closes.append([])
        content = view["content"]
        if isinstance(content, str):
            content = marked(content)
        else:
            content = [{**part, "text": marked(part["text"])} if "text" in part else part for part in content]
        marked_views.append({**view, "content": content})
    ends = [(found[0], found[-1]) if (found := texts_of(view)) else ("", "") for view in views]
    heads = [first[: len(first) - len(first.lstrip())] for first, _ in ends]
    tails = [last[len(last.rstrip()) :] if last.strip() else "" for _, last in ends]
    spellings = {character: token for token, character in typed.items()}
    return Marked(marked_views, opens, closes, heads, tails, spellings)


def texts_of(view: View) -> list[str]:
    """The texts of a message, in order."""
    content = view["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]


def scan(rendered: str, marked: Marked, tokenizer: LiteralTokenizer) -> Scanned:
    """A rendered text without its marks."""
    marks = {mark for group in (*marked.opens, *marked.closes) for mark in group}
    own = marks | set(marked.typed)
    text: list[str] = []
    written: list[str] = []
    origin: list[tuple[int, int, int]] = [(0, 0, 0)]
    at: dict[str, list[int]] = {}
    behind: list[int] = []
    longer: list[int] = []
    length = extra = meant = 0

    def plain(start: int, stop: int) -> None:
        nonlocal extra, meant
        cursor = start
        for match in tokenizer.matches(rendered, start, stop):
            add(cursor, rendered[cursor : match.start()])
            token = match[0]
            add(match.start(), tokenizer.private(token), token)
            extra += len(token) - 1
            meant += 1
            behind.append(length)
            longer.append(extra)
            cursor = match.end()
        add(cursor, rendered[cursor:stop])

    def add(place: int, piece: str, spelled: str = "") -> None:
        nonlocal length
        if piece:
            text.append(piece)
            written.append(spelled or piece)
            origin.append((place, length, len(piece)))
            length += len(piece)

    cursor = 0
    for place in (match.start() for match in PRIVATE.finditer(rendered) if match[0] in own):
        plain(cursor, place)
        character = rendered[place]
        if character in marks:
            at.setdefault(character, []).append(length)
            origin.append((place, length, 0))
        else:
            add(place, marked.typed[character])
        cursor = place + 1
    plain(cursor, len(rendered))
    whole = "".join(written)
    typed = bool(marked.typed) or len(tokenizer.found(whole)) != meant
    shift = (np.array(behind, np.int64), np.array(longer, np.int64))
    return Scanned("".join(text), whole, at, shift, origin, typed)


def _free(texts: Sequence[str]) -> Any:
    """Private characters that none of the texts holds."""
    used = {character for text in texts if text and max(text) >= chr(FIRST) for character in text}
    yield from (chr(code) for code in range(FIRST, LAST + 1) if chr(code) not in used)
    raise SampleError(f"a conversation of more than {(LAST - FIRST) // 2} texts")
