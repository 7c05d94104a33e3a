"""A chat template as transformers renders it, tried first within bounds of time and memory.

A template is a program that comes with the weights. Jinja's sandbox keeps it from files and attributes, but not from
loops without an end or strings without a limit, which Python cannot stop once they run. So every new template renders a
few short conversations in a process of its own first.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from rave_jax.config import ConfigError
from rave_jax.data.sample import SampleError

SECONDS = 5
"""CPU time that the trial of a template may take; one of a released model takes a few milliseconds."""
MEMORY = 1 << 30
"""Bytes of address space of the trial."""
WAIT = 60
"""Seconds after which a trial is ended, whatever it waits for."""

_MARKING = threading.Lock()
"""transformers keeps what it found marked in the compiled template, which all threads share. Of the module, so that a
template can be pickled."""


class Rendered(NamedTuple):
    """The text of a conversation, and (start, stop) of what `{% generation %}` marks in it, in characters."""

    text: str
    answers: tuple[tuple[int, int], ...]


class Template:
    """A Jinja chat template with the variables of its tokenizer.

    Args:
        tokenizer: of transformers; its special tokens are variables of the template (`bos_token` and the like).
        text: the Jinja text.

    Raises:
        ConfigError: the template asks for too much time or memory.
    """

    def __init__(self, tokenizer: Any, text: str):
        # Imported late: `data` is imported where no template is read, and transformers takes a second.
        from transformers.utils.chat_template_utils import render_jinja_template

        self._render: Any = render_jinja_template
        self._text = text
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
        """Does the template say with `{% generation %}` what an answer is?"""
        _try(text, tuple(sorted((k, v) for k, v in self._variables.items() if isinstance(v, str))))

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> Rendered:
        """A conversation as text.

        Raises:
            SampleError: the template refuses the conversation, or fails on it.
        """
        options = {**self._variables, "return_assistant_tokens_mask": self.marks_answers}
        try:
            if self.marks_answers:
                with _MARKING:
                    text, answers = self._rendered(messages, add_generation_prompt, options)
            else:
                text, answers = self._rendered(messages, add_generation_prompt, options)
        except jinja2.TemplateSyntaxError as error:
            raise SampleError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
        except jinja2.TemplateError as error:
            raise SampleError(f"the chat template cannot render the conversation: {error}") from error
        except Exception as error:  # a template is a program: it may raise whatever Python can
            said = " ".join(str(error).split())
            kind = type(error).__name__
            raise SampleError(f"the chat template fails on the conversation: {kind}: {said:.200}") from error
        return Rendered(text, tuple((start, stop) for start, stop in answers))

    def _rendered(self, messages: Sequence[Mapping[str, Any]], asks: bool, options: dict[str, Any]) -> tuple[str, list]:
        texts, answers = self._render([list(messages)], chat_template=self._text, add_generation_prompt=asks, **options)
        return texts[0], answers[0] if answers else []


def _conversations() -> list[list[dict[str, Any]]]:
    """What a template is tried on: each role, with text and with parts."""
    turns = ("user", "assistant", "user", "assistant")
    found = []
    for roles in (turns[:1], turns[:2], turns, ("system", *turns)):
        for parts in (False, True):
            content: Any = [{"type": "text", "text": "word " * 8}] if parts else "word " * 8
            found.append([{"role": role, "content": content} for role in roles])
    picture = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "word"}]
    return [*found, [{"role": "user", "content": picture}]]


@functools.lru_cache(maxsize=64)
def _try(text: str, variables: tuple[tuple[str, str], ...]) -> None:
    request = {
        "template": text,
        "variables": dict(variables),
        "conversations": _conversations(),
        "seconds": SECONDS,
        "memory": MEMORY,
        "path": [str(Path(jinja2.__file__).parents[1])],
    }
    script = Path(__file__).with_name("template_trial.py")
    # -I and -S: nothing of the environment is read, which takes longer than the trial.
    command = [sys.executable, "-I", "-S", str(script)]
    asked = json.dumps(request).encode()
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=WAIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(_too_much(f"it did not finish within {WAIT} s")) from error
    if done.returncode == 0:
        return
    said = done.stdout.decode(errors="replace").strip()
    if done.returncode < 0:
        raise ConfigError(_too_much(f"it did not finish within {SECONDS} s of CPU time"))
    if not said:
        fault = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(f"the chat template could not be tried: {''.join(fault) or f'exit code {done.returncode}'}")
    raise ConfigError(_too_much(" ".join(said.split())[:200]))


def _too_much(found: str) -> str:
    return (
        f"the chat template needs too much time or memory: {found}; a template renders short conversations "
        f"in {SECONDS} s and {MEMORY >> 20} MiB. Look for endless loops, large ranges and repeated strings in it"
    )
