"""One answer on stdout, as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rave_jax.config import ConfigError
from rave_jax.data.sample import SampleError
from rave_jax.inference import Completion, Piece


class Shown(NamedTuple):
    """What was printed, and the whole answer unless it was stopped."""

    text: str
    whole: Completion | None


def show(pieces: Iterator[Piece], verbose: bool, stopped: Callable[[], bool] = lambda: False) -> Shown:
    """Print the pieces of one answer as they come, and a line break.

    Args:
        pieces: of one request.
        verbose: print the number of tokens and the speed on stderr.
        stopped: asked after each piece: is this enough?

    Raises:
        ConfigError: there is no whole answer. What came of it before is on a line of its own.
    """
    start = time.perf_counter()
    texts: list[str] = []
    end = None
    for _, text, end in pieces:
        if isinstance(end, SampleError):
            if any(texts):
                print(flush=True)
            raise ConfigError(str(end)) from end
        texts.append(text)
        print(text, end="", flush=True)
        if end is None and stopped():
            break
    print(flush=True)
    if verbose and end is not None:
        prompt, seconds = end.prompt_tokens, time.perf_counter() - start
        say_speed(len(end.tokens), seconds, f"after a prompt of {prompt}, ended by {end.reason}")
    return Shown("".join(texts), end)


def say_speed(tokens: int, seconds: float, more: str) -> None:
    """What --verbose says."""
    print(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f}/s, compiling included), {more}", file=sys.stderr)
