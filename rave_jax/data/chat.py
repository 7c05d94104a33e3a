"""The chat template: a conversation as runs of tokens, each known to belong to one message.

The template is rendered and tokenized once, as transformers does it. In ChatML every message starts with one special
token that stands nowhere else, so the tokens are split there, and no character offsets are needed to know who speaks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from rave_jax.batch import Role
from rave_jax.config import ConfigError
from rave_jax.data.sample import Message, SampleError
from rave_jax.files import read_text

ROLES = {"system": Role.SYSTEM, "user": Role.QUESTION, "assistant": Role.RESPONSE}
VISUAL_TYPES = ("image", "video")


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
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
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

    Raises:
        ConfigError: the template is not of the ChatML kind: each message must start with a special token of its own,
            and an answer must start as a generation prompt does and end with a special token.
    """

    def __init__(self, tokenizer: Any, template: str):
        self._tokenizer = tokenizer
        self._template = template
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        special = frozenset(number for number, token in added.items() if token.special)
        talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        once, asked = self.render(talk[:1]), self.render(talk[:1], add_generation_prompt=True)
        if not asked.startswith(once) or len(asked) == len(once):
            raise ConfigError("the chat template adds no header for an answer when a generation prompt is asked")
        self._header = self.tokenize(asked[len(once) :])
        self._start = self._header[0]
        answer = self.tokenize(self.render(talk[:2]))[len(self.tokenize(once)) :]
        ends = [number for number in answer if number in special]
        if self._start not in special or len(ends) < 2 or answer[: len(self._header)] != self._header:
            raise ConfigError("the chat template puts no special token before and after an answer")
        preamble, *counts = (self.tokenize(self.render(talk[:n])).count(self._start) - n for n in (1, 2, 3))
        if preamble not in (0, 1) or set(counts) != {preamble}:
            raise ConfigError("the chat template does not start each message with one special token")
        self._has_preamble = preamble == 1
        self.end_id = ends[-1]
        """The token that ends a message: what generation stops at."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation as the tokenizer's `apply_chat_template` gives it."""
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise SampleError(f"the chat template cannot render the conversation: {error}") from error

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it count as such."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise SampleError(f"a text is no Unicode: {text[:40]!r}") from error

    def runs(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Run]:
        """The conversation as runs, in order; their tokens end to end are those of the whole text.

        Raises:
            SampleError: an unknown role or part, an answer without a question, or a text that holds the token that
                starts messages.
        """
        if not messages:
            raise SampleError("a conversation without messages")
        views = [template_view(message) for message in messages]
        if views[0]["role"] == "assistant":
            raise SampleError("the conversation starts with an answer")
        ids = self.tokenize(self.render(views, add_generation_prompt))
        starts = [index for index, number in enumerate(ids) if number == self._start]
        pieces = [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
        before = int(self._has_preamble and views[0]["role"] != "system")
        if len(pieces) != before + len(messages) + add_generation_prompt or starts[0] != 0:
            token = self._tokenizer.convert_ids_to_tokens(self._start)
            raise SampleError(f"{len(messages)} messages render to {len(pieces)}: does a text hold the token {token}?")
        runs = [Run(piece, Role.SYSTEM, (0, 0), ()) for piece in pieces[:before]]
        runs += [self._run(message, piece) for message, piece in zip(messages, pieces[before:], strict=False)]
        if add_generation_prompt:
            runs.append(Run(pieces[-1], Role.RESPONSE, (0, 0), ()))
        return runs

    def _run(self, message: Message, ids: list[int]) -> Run:
        role, content = ROLES[message["role"]], message["content"]
        parts = () if isinstance(content, str) else content
        visuals = tuple(part for part in parts if part["type"] in VISUAL_TYPES)
        if role is not Role.RESPONSE:
            return Run(ids, role, (0, 0), visuals)
        # Where an answer starts with line breaks, its first token also holds the header's: generation never starts
        # there, so that token counts as header.
        start = len(self._header)
        stop = max(index for index, number in enumerate(ids) if number == self.end_id) + 1
        return Run(ids, role, (start, stop), visuals, message.get("weight", 1.0))
