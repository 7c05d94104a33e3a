"""`rave-jax generate --interactive`: a conversation, a question per line."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.data.images import read_image
from rave_jax.data.sample import SampleError
from rave_jax.inference import Fault, Generator, Request, Sampling, interrupts
from rave_jax.tools.answer import show
from rave_jax.tools.folder import PictureFolder
from rave_jax.tools.request import question

COMMANDS = "/image PATH, /clear or /exit"


class Chat:
    """A conversation and what was said in it.

    Args:
        generator: answers.
        sampling: how.
        folder: where pictures of /image may lie.
        system: messages before every conversation.
        verbose: print the number of tokens and the speed on stderr.
    """

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling,
        folder: PictureFolder,
        system: Sequence[dict[str, Any]],
        verbose: bool,
    ):
        self._generator, self._sampling, self._folder, self._verbose = generator, sampling, folder, verbose
        self._system = list(system)
        self._said: list[dict[str, Any]] = []
        self.failed = False
        """Has an answer ended with a fault of the model, and not of what was asked?"""
        self._pictures: list[Any] = []

    def take(self, line: str) -> bool:
        """Do what a line says; False when it says that the conversation is over."""
        command, _, rest = line.strip().partition(" ")
        if not line.startswith("/"):
            self.ask(line)
        elif command == "/exit":
            return False
        elif command == "/clear":
            self._said, self._pictures = [], []
        elif command == "/image" and rest:
            try:
                self.attach(self._folder.find(os.path.expanduser(rest.strip())))
            except (ConfigError, SampleError) as error:
                _say(str(error))
        else:
            missing = "needs the path of a picture" if command == "/image" else "is not a command"
            _say(f"{command} {missing}: expected {COMMANDS}, or a question")
        return True

    def attach(self, path: str) -> None:
        """Put a picture before the next question. It is read now, and stays the same if the file does not.

        Raises:
            SampleError: it is none.
        """
        self._pictures.append(read_image(path))

    def ask(self, text: str) -> None:
        """Answer a question. Where that cannot be done, what was said stays as it was, and the question's pictures go
        with it: they may be the reason."""
        if not text.strip():
            return
        asked = question(text, tuple(self._pictures))
        request = Request([*self._system, *self._said, asked], self._sampling, "the conversation")
        with interrupts.remembered() as stopped, contextlib.closing(self._generator.stream([request])) as pieces:
            try:
                text, whole = show(pieces, self._verbose, stopped)
            except ConfigError as error:
                self.failed |= isinstance(error.__cause__, Fault)
                dropped = "; its pictures are dropped too" if self._pictures else ""
                self._pictures = []
                return _say(f"{error}{dropped}")
        self._said += [asked, {"role": "assistant", "content": text}]
        self._pictures = []
        if whole is not None and whole.reason == "full":
            _say("the answer ends here: the conversation has reached max_length (or max_text); /clear begins another")


def chat(
    make: Callable[[], Generator],
    sampling: Sampling,
    folder: PictureFolder,
    system: Sequence[dict[str, Any]] = (),
    images: Sequence[str] = (),
    prompt: str | None = None,
    verbose: bool = False,
) -> bool:
    """Talk over stdin and stdout until one of them ends. Remarks go to stderr.
    Returns whether every answer that the model began came to its end.

    Args:
        make: gives the generator.
        sampling: how answers are chosen.
        folder: where pictures of /image may lie.
        system: messages before every conversation.
        images: go before the first question.
        prompt: the first question; None leaves it to stdin.
        verbose: print the number of tokens and the speed on stderr.

    Raises:
        ConfigError: the model or one of `images` cannot be used.
    """
    talk = Chat(make(), sampling, folder, system, verbose)
    for path in images:
        try:
            talk.attach(path)
        except SampleError as error:
            raise ConfigError(str(error)) from error
    if prompt is not None:
        talk.ask(prompt)
    for line in _lines():
        if not talk.take(line):
            break
    return not talk.failed


def _lines() -> Iterator[str]:
    terminal = sys.stdin.isatty()
    if terminal:
        _say(f"One question per line, or {COMMANDS}. Ctrl-C stops an answer.")
        with contextlib.suppress(ImportError):  # input() then has arrow keys and a memory, where Python was built so
            importlib.import_module("readline")
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
        except UnicodeDecodeError as error:
            _say(f"a line is not text: {error}")
        except KeyboardInterrupt:
            if not terminal:
                raise
            _say("\n/exit leaves")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
