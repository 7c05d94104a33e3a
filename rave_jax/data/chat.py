"""The chat template: a conversation as runs of tokens, each known to belong to one message.

The tokens are those of the whole text as transformers renders it. Who speaks is known from private marks, which are
rendered along with the texts and taken out again (`marks.py`), and from what the template is seen to write around
messages (`turns.py`), whatever its format.

Special tokens are written by the template alone. Where a message spells one, it is text (`literal.py`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rave_jax.batch import Role
from rave_jax.config import ConfigError
from rave_jax.data.literal import Encoded, LiteralTokenizer
from rave_jax.data.marks import Marked, Scanned, View, mark, scan, texts_of
from rave_jax.data.sample import Message, SampleError
from rave_jax.data.template import Rendered, Template
from rave_jax.data.turns import Trial, find_turns, learn_turns
from rave_jax.data.video_text import VideoText, spell_videos, videos_of
from rave_jax.files import read_text
from rave_jax.typing import NpArray

ROLES = {"system": Role.SYSTEM, "user": Role.QUESTION, "assistant": Role.RESPONSE}
VISUAL_TYPES = ("image", "video")
SpecialTokens = Literal["text", "tokens"]
"""What special tokens are that a message spells out: text like any other, or the tokens."""


class Run(NamedTuple):
    """Tokens of one message (or of the template's own preamble), placeholders of pictures standing once each.

    Fields:
        ids: token ids.
        role: who speaks.
        learn: (start, stop) of the tokens to learn in `ids`; empty where nothing is an answer.
        visuals: the message's image and video parts in order.
        weight: of the tokens to learn in the loss.
    """

    ids: list[int]
    role: Role
    learn: tuple[int, int]
    visuals: tuple[Message, ...]
    weight: float = 1.0


def read_template(directory: str | Path, tokenizer: Any) -> str:
    """The chat template of an HF directory: chat_template.jinja, chat_template.json, or the tokenizer's own.

    Raises:
        ConfigError: there is none.
    """
    directory = Path(directory)
    raw, legacy = directory / "chat_template.jinja", directory / "chat_template.json"
    if raw.exists():
        return read_text(raw)
    if legacy.exists():
        try:
            return str(json.loads(read_text(legacy))["chat_template"])
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{legacy}: expected an object with the key 'chat_template'") from error
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            names = ", ".join(map(repr, own))
            raise ConfigError(f"{directory}: tokenizer_config.json has the chat templates {names}: expected 'default'")
        own = own["default"]
    if isinstance(own, str):
        return own
    raise ConfigError(
        f"{directory}: no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json"
    )


def template_view(message: Message) -> dict[str, Any]:
    """The message as the template sees it: pictures without their pixels, nothing else changed.

    Raises:
        SampleError: a role or a part that is not known.
    """
    if not hasattr(message, "get"):
        raise SampleError(f"a message is {type(message).__name__}: expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise SampleError(f"role {role!r}: expected system, user or assistant")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, Sequence):
        raise SampleError(f"content of a {role} message is {type(content).__name__}: expected text or a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if hasattr(part, "get") else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise SampleError(f"the text of a text part is {part.get('text')!r}: expected a string")
            parts.append({"type": "text", "text": part["text"]})
        elif kind in VISUAL_TYPES:
            if kind not in part:
                raise SampleError(f"{kind} part without the key {kind!r}")
            parts.append({"type": kind})
        else:
            raise SampleError(f"part of type {kind!r} in a {role} message: expected text, image or video")
    return {"role": role, "content": parts}


class ChatTemplate:
    """Renders conversations with a Jinja template and splits them into `Run`s.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: the Jinja text.
        special_tokens_in_text: what special tokens are that a message spells out.
        leading: do the tokens that the tokenizer puts in front of a text stand before a conversation whose text does
            not begin with `bos_token`? In transformers they do for processors of pictures, and not for tokenizers.
        videos: how videos become text first; None: their placeholders are tokens.

    Raises:
        ConfigError: the template asks for too much time or memory, or does not show where an answer begins and ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        special_tokens_in_text: SpecialTokens = "text",
        leading: bool = False,
        videos: VideoText | None = None,
    ):
        self.settings = (template, special_tokens_in_text, leading)
        """What it was made with, beside the tokenizer."""
        self._tokenizer = tokenizer
        self._template = template
        self._literal = special_tokens_in_text == "text"
        self._words = LiteralTokenizer(tokenizer)
        self._leading = self._words.leading if leading else []
        self._videos = videos
        self._jinja = Template(tokenizer, template)
        self._header = ""
        try:
            self._forms: dict[str, tuple[bool, bool]] = {}
            for role in ("user", "assistant", "system"):
                self._forms[role] = self._form(role)
            # Where answers are marked, they are known without a token at their end.
            marked = self._jinja.marks_answers and tokenizer.eos_token_id is not None
            self._turns = learn_turns(self._trial, self._words.ids.__contains__, ends=not marked)
            self._marks_answers = bool(self._jinja.render(self._talk(["user", "assistant"])).answers)
        except SampleError as error:
            raise ConfigError(str(error)) from error
        self._header = "".join(self._words.spelled.get(character, character) for character in self._turns.adds)
        self.end_id = self._words.ids[self._turns.end] if self._turns.end else tokenizer.eos_token_id
        """The token that ends a message: what generation stops at."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation as the tokenizer's `apply_chat_template` gives it.

        Where a template ignores that a generation prompt is asked for, the header of its answers is put behind.
        """
        return self._rendered(messages, add_generation_prompt).text

    def runs(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Run]:
        """The conversation as runs, in order; their tokens end to end are those of the whole text.

        Raises:
            SampleError: an unknown role or part, an answer without a question, or a conversation that the template
                refuses or renders in a way that hides where its messages end.
        """
        if not messages:
            raise SampleError("a conversation without messages")
        views = [self._in_form(template_view(message)) for message in messages]
        roles = [view["role"] for view in views]
        if roles[0] == "assistant":
            raise SampleError("the conversation starts with an answer")
        texts = None if self._videos is None else [self._videos.spelled(part) for part in videos_of(messages)]
        scanned, marked, answers = self._scan(views, add_generation_prompt, texts)
        spans = find_turns(self._turns, roles, scanned, marked, add_generation_prompt)
        learn = spans.learn
        if self._marks_answers:
            learn = _marked_alone(learn, answers, scanned.text if not self._turns.end else "")
        encoded, places = self._encode(scanned, views)

        # The first token that begins at each place or behind it.
        bounds = [*spans.bounds, *itertools.chain(*learn)]
        firsts = np.searchsorted(encoded.starts, places(bounds)).tolist()
        cuts, spoken = firsts[: len(spans.bounds)], firsts[len(spans.bounds) :]
        cuts[0] = cuts[0] if spans.preamble else 0
        bos = self._tokenizer.bos_token
        leading = [] if bos is not None and scanned.written.startswith(bos) else self._leading
        preamble = leading + encoded.ids[: cuts[0]]
        runs = [Run(preamble, Role.SYSTEM, (0, 0), ())] if preamble else []
        for number, message in enumerate(messages):
            begin, end = cuts[number : number + 2]
            # Where an answer starts with line breaks, its first token may also hold the header's: generation never
            # starts there, so that token counts as header.
            start, stop = (min(max(n, begin), end) - begin for n in spoken[2 * number : 2 * number + 2])
            runs.append(_run(message, encoded.ids[begin:end], (start, stop) if start < stop else (0, 0)))
        if add_generation_prompt:
            runs.append(Run(encoded.ids[cuts[-1] :], Role.RESPONSE, (0, 0), ()))
        elif not self._turns.end:
            runs[-1] = self._ended(runs[-1])
        return runs

    def _ended(self, run: Run) -> Run:
        """The last message where the template ends no answer: an answer that is learned ends as generation would end
        it, with `eos_token` in place of what the template writes behind it."""
        start, stop = run.learn
        return run._replace(ids=[*run.ids[:stop], self.end_id], learn=(start, stop + 1)) if start < stop else run

    def _rendered(self, views: Sequence[View], asks: bool) -> Rendered:
        rendered = self._jinja.render(views, asks)
        return rendered._replace(text=rendered.text + self._header) if asks else rendered

    def _scan(
        self, views: Sequence[View], asks: bool, videos: Sequence[str] | None = None
    ) -> tuple[Scanned, Marked, list[tuple[int, int]]]:
        """The conversation as rendered, with these texts for its videos, the marks in it, and what the template says
        are answers.

        Marks must not change what the template writes. Where they do, texts are looked for as they are.
        """
        plain = self._rendered(views, asks).text
        for around in (True, False):
            marked = mark(views, self._words, self._literal, around)
            try:
                rendered = self._rendered(marked.views, asks)
            except SampleError:
                continue  # the template refuses a text that has marks in it
            scanned = scan(rendered.text, marked, self._words)
            if scanned.written == plain:
                if self._videos is not None and videos is not None and (videos or not self._literal):
                    if videos and not around:
                        raise SampleError(
                            "the chat template looks into the texts of this conversation, so they cannot be told from "
                            "those of its videos"
                        )
                    rendered = spell_videos(rendered, marked, self._videos.placeholder, videos, self._literal)
                    scanned = scan(rendered.text, marked, self._words)
                answers = [(scanned.in_text(start), scanned.in_text(stop)) for start, stop in rendered.answers]
                return (scanned, marked, answers) if around else (*_searched(views, marked, scanned), answers)
        raise SampleError("the chat template changes the text of a message that spells out a special token")

    def _encode(self, scanned: Scanned, views: Sequence[View]) -> tuple[Encoded, Callable[[Sequence[int]], NpArray]]:
        """The tokens, and places of `scanned.text` as places of the text that they were made from."""
        if not (self._literal and scanned.typed):
            return self._words.encode(scanned.written), scanned.in_written
        taken = {character for view in views for text in texts_of(view) for character in text} & set(self._words.ids)
        if taken:
            names = ", ".join(f"U+{ord(character):X}" for character in sorted(taken))
            raise SampleError(
                f"a text spells out a special token and also holds {names}, which rave_jax uses in place of special "
                "tokens: remove these characters"
            )
        return self._words.encode_literal(scanned.text), np.asarray

    def _in_form(self, view: View) -> View:
        """The message in a form that the template takes: its text, or a list of parts."""
        content = view["content"]
        takes_text, takes_parts = self._forms[view["role"]]
        if isinstance(content, str):
            return view if takes_text else {**view, "content": [{"type": "text", "text": content}]}
        if takes_parts:
            return view
        if any(part["type"] in VISUAL_TYPES for part in content):
            raise SampleError(f"the chat template does not accept pictures in a {view['role']} message")
        return {**view, "content": "".join(texts_of(view))}

    def _form(self, role: str) -> tuple[bool, bool]:
        """Does the template take a text in a message of this role, and does it take a list of parts?"""
        roles = {"user": ["user"], "assistant": ["user", "assistant"], "system": ["system", "user"]}[role]
        taken, faults = [], []
        for form in ((True, False), (False, True)):
            self._forms[role] = form
            try:
                self._trial(roles, False)
                taken.append(True)
            except SampleError as error:
                taken.append(False)
                faults.append(error)
        if role != "system" and not any(taken):
            raise faults[0]
        # A template may refuse system messages: it then says so for the conversation that has one.
        return (taken[0], taken[1]) if any(taken) else (True, True)

    def _talk(self, roles: Sequence[str]) -> list[View]:
        return [self._in_form({"role": role, "content": "a"}) for role in roles]

    def _trial(self, roles: Sequence[str], asks: bool) -> Trial:
        """A short conversation, every text of it found."""
        views = self._talk(roles)
        marked = mark(views, self._words, literal=False)
        scanned = scan(self._jinja.render(marked.views, asks).text, marked, self._words)
        contents = []
        for number, role in enumerate(roles):
            places = [scanned.at.get(found[number][0], []) for found in (marked.opens, marked.closes)]
            if [len(found) for found in places] != [1, 1]:
                times = "leaves out" if not all(places) else "repeats"
                raise SampleError(f"the chat template {times} the text of a message (message {number}, {role})")
            contents.append((places[0][0], places[1][0]))
        return Trial(scanned.text, contents)


def _run(message: Message, ids: list[int], learn: tuple[int, int]) -> Run:
    content = message["content"]
    parts = () if isinstance(content, str) else content
    visuals = tuple(part for part in parts if part["type"] in VISUAL_TYPES)
    return Run(ids, ROLES[message["role"]], learn, visuals, message.get("weight", 1.0))


def _marked_alone(
    learn: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]], text: str
) -> list[tuple[int, int]]:
    """What is learned where the template marks answers with `{% generation %}`: from the mark on, and nothing of an
    answer without one. Spaces of `text` before the mark are learned too: they begin the answer's first token, and
    generation begins before them."""
    found = []
    for start, stop in learn:
        inside = [begin for begin, end in answers if begin < stop and end > start]
        begin = max(start, min(inside, default=stop))
        spaces = text[start:begin].isspace()
        found.append((start if spaces else begin, stop) if inside else (0, 0))
    return found


def _searched(views: Sequence[View], marked: Marked, scanned: Scanned) -> tuple[Scanned, Marked]:
    """As if the texts had been marked, those that stand in the rendered text in their order."""
    at: dict[str, list[int]] = {}
    cursor = 0
    for number, view in enumerate(views):
        for text in filter(None, map(str.strip, texts_of(view))):
            place = scanned.text.find(text, cursor)
            if place >= 0:
                cursor = place + len(text)
                at.setdefault(f"open {number}", []).append(place)
                at.setdefault(f"close {number}", []).append(cursor)
    opens, closes = ([[f"{name} {n}"] for n in range(len(views))] for name in ("open", "close"))
    return scanned._replace(at=at), marked._replace(opens=opens, closes=closes)
