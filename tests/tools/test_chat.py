"""`rave-jax generate --interactive`: a conversation is kept, and a turn that cannot be used changes nothing in it."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from rave_jax.inference import Generator, Request, Sampling
from rave_jax.tools.cli import main
from tests.tools.generating import FLAGS, answer, user


def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, more: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    more = ("--image-dir", str(folder.parent), *more)
    assert main(["generate", str(folder), "--interactive", *FLAGS, *more]) == 0


def test_a_conversation_is_kept(
    folder: Path,
    generator: Generator,
    loaded: list[tuple],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = folder.parent / "one.png", folder.parent / "two.png"
    first = answer(generator, user("What?")).text
    said = [user("What?"), {"role": "assistant", "content": first}]
    second = answer(generator, *said, user("Which?", one, two)).text
    alone = answer(generator, user("Which?")).text
    assert len({second, alone}) == 2
    lines = (
        "What?",
        "",
        f"/image {one}",
        f"/image {two}",
        "Which?",
        f"/image {one}",
        "/clear",
        "Which?",
        "/exit",
        "What?",
    )
    talk(folder, monkeypatch, *lines)
    printed = capsys.readouterr()
    assert printed.out == f"{first}\n{second}\n{alone}\n" and printed.err == ""
    talk(folder, monkeypatch, "Which?", more=("--prompt", "What?", "--image", str(one)))
    opened = answer(generator, user("What?", one)).text
    after = answer(generator, user("What?", one), {"role": "assistant", "content": opened}, user("Which?")).text
    assert capsys.readouterr().out == f"{opened}\n{after}\n"


def test_a_turn_that_cannot_be_used_changes_nothing(
    folder: Path,
    generator: Generator,
    loaded: list[tuple],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = answer(generator, user("What?")).text
    second = answer(generator, user("What?"), {"role": "assistant", "content": first}, user("Which?")).text
    bad = (f"/image {folder.parent / 'broken.png'}", "/image", "/help me", "word " * 200)
    thin = (f"/image {folder.parent / 'thin.png'}", "What is on it?")
    talk(folder, monkeypatch, "What?", *bad, *thin, "Which?")
    printed = capsys.readouterr()
    assert printed.out == f"{first}\n{second}\n"
    errors = printed.err.splitlines()
    assert len(errors) == len(bad) + 1
    expected = (
        "broken.png: cannot",
        "/image needs the path of a picture: expected /image PATH",
        "/help is not a command: expected /image PATH",
        "budget of max_length 128",
        "; its pictures are dropped too",
    )
    assert all(part in line for part, line in zip(expected, errors, strict=True)), errors


def test_interrupting_an_answer_keeps_what_was_said(
    folder: Path,
    generator: Generator,
    loaded: list[tuple],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C at the first piece of an answer that would go on."""
    pieces = [piece.text for piece in generator.stream([Request([user("What?")], Sampling(max_new_tokens=64))])]
    assert len(pieces) > 3
    stream, turns = generator.stream, []

    def interrupted(requests: list[Request]) -> Any:
        turns.append(requests[0].messages)
        for piece in stream(requests):
            if len(turns) == 1:
                signal.raise_signal(signal.SIGINT)
            yield piece

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(generator, "stream", interrupted)
    talk(folder, monkeypatch, "What?", "Which?", more=("--max-new-tokens", "64"))
    assert signal.getsignal(signal.SIGINT) is before
    assert turns[1][1] == {"role": "assistant", "content": pieces[0]}
    assert capsys.readouterr().out.startswith(pieces[0] + "\n")
