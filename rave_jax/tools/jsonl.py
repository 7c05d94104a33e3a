"""Requests and answers as JSON Lines: one line each, in order, and one bad line spoils no other."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import sys
import time
import typing
from collections import abc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from rave_jax.config import ConfigError, from_json, shown
from rave_jax.data.sample import SampleError
from rave_jax.data.sources.files import parse
from rave_jax.files import NotAFile, open_regular
from rave_jax.inference import Completion, Generator, Request, Sampling
from rave_jax.tools.answer import say_speed
from rave_jax.tools.folder import PictureFolder
from rave_jax.tools.request import meant, resolved

MESSAGES = "messages"
STDIN = ("-", "/dev/stdin")
"""Names of standard input."""
KINDS: dict[str, Any] = typing.get_type_hints(Sampling)
"""The fields that a request may state."""

Write = Callable[[dict[str, Any]], None]


class Tally(NamedTuple):
    """How many requests were answered with how many tokens, and how many were not."""

    answered: int
    tokens: int
    refused: int


def answer_file(
    path: Path,
    out: Path | None,
    sampling: Sampling,
    make: Callable[[], Generator],
    verbose: bool = False,
    image_dir: Path | None = None,
) -> Tally:
    """Answer every request of a file.

    Args:
        path: one object a line: `messages` in HF chat format, image paths relative to this file, and any field of
            `Sampling`. Blank lines do not count. `-` is stdin, with paths relative to the working directory.
        out: gets `{"index", "text", "reason", "tokens", "prompt_tokens"}` a line, or `{"index", "error"}`, in the
            order of the requests; None is stdout.
        sampling: for what a request does not state.
        make: gives the generator; called when both files can be used.
        verbose: print the number of tokens and the speed on stderr.
        image_dir: the folder that pictures must lie below; None is the one that paths are relative to.

    Raises:
        ConfigError: a file or the model cannot be used.
    """
    if out is not None and out.resolve() == path.resolve():
        raise ConfigError(f"--out {out} is the file of requests: give another --out")
    stdin = str(path) in STDIN
    folder = PictureFolder.of(Path() if stdin else path.parent, image_dir)
    with contextlib.ExitStack() as stack:
        if stdin and sys.stdin is None:
            raise ConfigError(f"{path}: standard input is closed")
        try:
            file = _standard_input() if stdin else stack.enter_context(open_regular(path))
        except NotAFile as error:
            raise ConfigError(f"{path}: {error.strerror}. Save the requests, or pipe them to `--requests -`") from error
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        write = _print if out is None else stack.enter_context(written(out))
        generator = make()
        start = time.perf_counter()
        tally = answer_all(generator, read_lines(file, folder, sampling), write)
        if verbose:
            used = f"of {tally.answered} answers, {generator.usage.occupancy:.0%} of the slots in use"
            say_speed(tally.tokens, time.perf_counter() - start, used)
    return tally


def _standard_input() -> IO[bytes]:
    """Standard input, apart from `sys.stdin`: Python aborts if it ends while a thread waits inside of that one."""
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:  # what stands in its place is no file
        return sys.stdin.buffer


def answer_all(generator: Generator, requests: Iterable[Request | SampleError], write: Write) -> Tally:
    """Answer requests and write a line for each in order. Lines wait for those before them."""
    ready: dict[int, Completion | SampleError] = {}
    tally = Tally(0, 0, 0)
    for piece in generator.stream(requests):
        if piece.end is not None:
            ready[piece.request] = piece.end
        while (end := ready.pop(place := tally.answered + tally.refused, None)) is not None:
            write(_line(place, end))
            if isinstance(end, SampleError):
                tally = tally._replace(refused=tally.refused + 1)
            else:
                tally = Tally(tally.answered + 1, tally.tokens + len(end.tokens), tally.refused)
    return tally


def _line(place: int, end: Completion | SampleError) -> dict[str, Any]:
    if isinstance(end, SampleError):
        return {"index": place, "error": str(end)}
    counts = {"tokens": len(end.tokens), "prompt_tokens": end.prompt_tokens}
    return {"index": place, "text": end.text, "reason": end.reason, **counts}


def read_lines(lines: Iterable[bytes], folder: PictureFolder, sampling: Sampling) -> Iterator[Request | SampleError]:
    """The requests of a file, or what is wrong with a line.

    Args:
        lines: of the file; blank ones are passed over.
        folder: where pictures may lie.
        sampling: for what a line does not state.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            data = parse(line)
        except ValueError as error:
            yield SampleError(f"{where}: not JSON: {error}")
        else:
            try:
                yield _request(data, folder, sampling, where)
            except ConfigError as error:
                yield SampleError(str(error))


def _request(data: Any, folder: PictureFolder, sampling: Sampling, where: str) -> Request:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object with the key {MESSAGES!r}")
    known = (MESSAGES, *KINDS)
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {shown(key)}{meant(key, known)}")
    try:
        stated = {key: from_json(KINDS[key], value, key) for key, value in data.items() if key in KINDS}
        chosen = dataclasses.replace(sampling, **stated)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return Request(resolved(data.get(MESSAGES), folder, f"{where}: {MESSAGES}"), chosen, where)


@contextlib.contextmanager
def written(out: Path) -> abc.Generator[Write]:
    """Lines go to OUT.part as they come and are seen under the name of OUT when all are there.

    A job of hours that is killed so leaves what it had, and no file that looks complete and is not. The same job would
    then write over it from the start, so it refuses until somebody has moved the file.

    Raises:
        ConfigError: the file cannot be written.
    """
    out = out.resolve()
    if out.exists() and not out.is_file():
        raise ConfigError(f"cannot write {out}: it exists and is not a file")
    part = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("xb")
    except OSError as error:
        if not part.exists():
            raise _cannot_write(out, error) from error
        raise ConfigError(
            f"{part} exists: another job is writing it, or left it unfinished; move it away or delete it"
        ) from error

    def write(line: dict[str, Any]) -> None:
        try:
            file.write(_text(line).encode() + b"\n")
            file.flush()
        except OSError as error:
            raise _cannot_write(part, error) from error

    try:
        with file:
            yield write
        part.replace(out)
    except BaseException:
        if part.stat().st_size:
            print(f"rave-jax: the answers before the end are in {part}", file=sys.stderr)
        else:
            part.unlink()
        raise


def _print(line: dict[str, Any]) -> None:
    print(_text(line), flush=True)


def _text(line: dict[str, Any]) -> str:
    # Half a surrogate pair, from a path that is no Unicode, cannot be written but as the escape that JSON has for it.
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write {path}: {error.strerror or os.strerror(error.errno or errno.EIO)}")
