"""Where messages begin and end in a rendered conversation, learned from what a template does with a few short ones.

In the texts here, each special token that the template wrote is one private character (see `marks.py`), so that parts
that two texts share never end within a special token. For a message of any role,

    text = header, content, footer          conversation = preamble, text, text, ..., text [, asking]

where `asking` is what a generation prompt adds. A footer is what follows a message both at the end of a conversation
and before the next message. An answer is learned from where generation would begin it, behind `asking`, up to the last
special token of its footer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rave_jax.config import ConfigError
from rave_jax.data.marks import Marked, Scanned
from rave_jax.data.sample import SampleError


class Turns(NamedTuple):
    """What a template writes around messages.

    Fields:
        preamble: before a conversation that the user opens.
        asking: what a generation prompt adds, the header of an answer.
        adds: what we add to a generation prompt, where the template ignores that one is asked for.
        headers: other headers that answers have, the longest first.
        user: the header of a user's message.
        footers: of each role.
        end: the last special token in the footer of an answer; empty where there is none.
    """

    preamble: str
    asking: str
    adds: str
    headers: tuple[str, ...]
    user: str
    footers: dict[str, str]
    end: str


class Spans(NamedTuple):
    """Where the messages of a conversation stand.

    Fields:
        bounds: of all messages; the i-th is at bounds[i] to bounds[i + 1].
        preamble: end of the preamble; 0 without one.
        learn: for each message, what is learned of it; empty for all but answers.
    """

    bounds: list[int]
    preamble: int
    learn: list[tuple[int, int]]


class Probe(NamedTuple):
    """A short conversation as rendered.

    Fields:
        text: the whole.
        contents: where the content of each message stands.
    """

    text: str
    contents: list[tuple[int, int]]

    def gap(self, number: int) -> str:
        """What stands between the content of a message and the next, or the end."""
        stop = self.contents[number + 1][0] if number + 1 < len(self.contents) else len(self.text)
        return self.text[self.contents[number][1] : stop]


def learn_turns(
    probe: Callable[[Sequence[str], bool], Probe], is_special: Callable[[str], bool], ends: bool = True
) -> Turns:
    """What a template writes around messages.

    Args:
        probe: renders a conversation of these roles, with or without a generation prompt.
        is_special: does a character stand for a special token?
        ends: do answers have to end with a special token?

    Raises:
        ConfigError: answers do not end with a special token and have to, or a generation prompt changes what stands
            before it.
        SampleError: the template refuses a conversation of user and assistant.
    """
    user, assistant = "user", "assistant"
    asked = probe([user], True).gap(0)
    answered, followed = probe([user, assistant], False), probe([user, assistant, user], False)
    twice = probe([user, assistant, user, assistant], False)
    footers = {
        user: common_start(twice.gap(0), probe([user], False).gap(0)),
        assistant: common_start(answered.gap(1), followed.gap(1)),
    }
    if not asked.startswith(footers[user]):
        raise ConfigError(
            "the chat template changes the end of a question when it adds a generation prompt, so training and "
            "generation would differ"
        )
    found = [character for character in footers[assistant] if is_special(character)]
    if ends and not found:
        raise ConfigError(
            "the chat template puts no special token after an answer, so no model could learn where to stop: an "
            "answer should end with a token such as eos_token, in the middle of a conversation and at its end"
        )
    opening = followed.gap(1)[len(footers[assistant]) :]
    headers = {text.gap(0)[len(footers[user]) :] for text in (answered, followed, twice)}
    headers.add(twice.gap(2)[len(footers[user]) :])
    asking, adds = asked[len(footers[user]) :], ""
    if not asking:
        middle = followed.gap(0)[len(footers[user]) :]
        adds = asking = middle if middle.strip() else ""
    before = answered.text[: answered.contents[0][0]]
    preamble = before[: len(before) - len(common_end(before, opening))]
    try:
        system = probe(["system", user], False).gap(0)
        footers["system"] = system.removesuffix(opening)
    except SampleError:
        pass  # conversations with a system message are refused one by one, as the template says
    return Turns(
        preamble,
        asking,
        adds,
        tuple(sorted(headers, key=len, reverse=True)),
        opening,
        footers,
        found[-1] if found else "",
    )


def find_turns(turns: Turns, roles: Sequence[str], scanned: Scanned, marked: Marked, asks: bool) -> Spans:
    """Where the messages of a conversation stand.

    Args:
        turns: of the template.
        roles: who speaks each message.
        scanned: the conversation as rendered.
        marked: the marks of its texts.
        asks: does it end with a generation prompt?

    Raises:
        SampleError: the template renders it in a way that hides where a message ends.
    """
    starts = [scanned.first(found) for found in marked.opens]
    stops = [scanned.last(found) for found in marked.closes]
    text = scanned.text
    if asks and text.endswith(turns.asking):
        text = text[: len(text) - len(turns.asking)]
    elif asks:  # the template writes another one here than behind a single question
        last = stops[-1]
        if last is None:
            raise SampleError(_hidden(len(roles) - 1, roles[-1]))
        text = text[: last + _end_of_footer(text[last:], turns.footers.get(roles[-1], ""), ())]
    preamble = len(turns.preamble) if roles[0] != "system" and text.startswith(turns.preamble) else 0
    bounds = [preamble]
    for number, role in enumerate(roles[:-1]):
        later = next((place for place in starts[number + 1 :] if place is not None), None)
        stop, follower = stops[number], starts[number + 1]
        if role == "system" and stop is not None and later is not None and stop > later:
            stops[number], bounds = None, [*bounds, bounds[-1]]  # the template moved it into a message that follows
            continue
        headers = (turns.user,) if roles[number + 1] == "user" else (turns.asking, *turns.headers)
        if stop is not None:
            stop = stops[number] = _behind_spaces(text, stop, marked.tails[number], turns.footers.get(role, ""))
            gap = text[stop : len(text) if follower is None else follower]
            bound = stop + _end_of_footer(gap, turns.footers.get(role), headers)
        elif follower is not None:
            bound = _begin_of_header(text[:follower], bounds[-1], marked.heads[number + 1], headers)
        else:
            footer = turns.footers.get(role, "")
            if not footer.strip() or footer not in text[bounds[-1] :]:
                raise SampleError(_hidden(number, role))
            bound = text.index(footer, bounds[-1]) + len(footer)
        bounds.append(bound)
    bounds.append(len(text))
    if stops[-1] is not None:
        stops[-1] = _behind_spaces(text, stops[-1], marked.tails[-1], turns.footers.get(roles[-1], ""))
    if any(a > b for a, b in itertools.pairwise(bounds)):
        raise SampleError("the chat template does not keep the order of the messages")
    learn = [
        _learned(turns, text, bounds[n : n + 2], starts[n], stops[n], n) if role == "assistant" else (0, 0)
        for n, role in enumerate(roles)
    ]
    return Spans(bounds, preamble, learn)


def _behind_spaces(text: str, stop: int, tail: str, footer: str) -> int:
    """The end of a content whose last word ends at `stop`, where the template may have trimmed its spaces."""
    whole = stop + len(tail)
    return whole if text.startswith(tail, stop) and text.startswith(footer, whole) else stop


def _end_of_footer(gap: str, footer: str | None, headers: Sequence[str]) -> int:
    """Where the footer ends in what stands between the texts of two messages: there may be pictures before it."""
    if footer is not None and gap.startswith(footer):
        return len(footer)
    if footer is not None and footer.strip() and footer in gap:
        return gap.index(footer) + len(footer)
    header = max((header for header in headers if gap.endswith(header)), key=len, default="")
    return len(gap) - len(header) if header or footer is None else len(common_start(gap, footer))


def _begin_of_header(before: str, begin: int, head: str, headers: Sequence[str]) -> int:
    """Where the header begins of a message whose content, but for the spaces at its head, follows `before`."""
    for text in (before.removesuffix(head), before):
        header = max((header for header in headers if text.endswith(header, begin)), key=len, default="")
        if header:
            return len(text) - len(header)
    return len(before)


def _learned(
    turns: Turns, text: str, bounds: Sequence[int], start: int | None, stop: int | None, number: int
) -> tuple[int, int]:
    """What is learned of an answer, from where generation would begin it."""
    begin, end = bounds
    whole = text[begin:end]
    header = next((h for h in (turns.asking, *turns.headers) if whole.startswith(h)), None)
    if header is not None:
        start = begin + len(header)
    footer = turns.footers["assistant"]
    last = footer.rindex(turns.end) + 1 if turns.end else 0
    if not turns.end:
        stop = -1 if stop is None else stop
    elif stop is not None and text.startswith(footer[:last], stop):
        stop = stop + last
    else:
        stop = begin + whole.rfind(turns.end) + 1
    if start is None or stop <= max(start, begin):
        raise SampleError(_hidden(number, "assistant"))
    return start, stop


def _hidden(number: int, role: str) -> str:
    return f"the chat template does not show where message {number} ({role}) begins and ends"


def common_start(one: str, other: str) -> str:
    """The longest text that both begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in pairs)]


def common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    return common_start(one[::-1], other[::-1])[::-1]
