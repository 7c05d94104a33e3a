"""What tests of `rave-jax generate` share: a small model with pictures beside it, and what it answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rave_jax.checkpoint.tiny import write_tiny
from rave_jax.inference import Completion, Generator, Request, Sampling, SlotConfig
from rave_jax.tools import generate as command
from rave_jax.tools import source as sources
from tests.tools.test_cli import SMALL

SIZES = SlotConfig(slots=2, max_length=128, chunk=64)
FLAGS = ("--slots", "2", "--max-length", "128", "--chunk", "64", "--max-new-tokens", "8")
SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two pictures beside it."""
    home = tmp_path_factory.mktemp("generate")
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(0, 256, (56, 84, 3), np.uint8)).save(home / name)
    Image.new("RGB", (3000, 10)).save(home / "thin.png")  # a picture, but of no shape that a model takes
    (home / "broken.png").write_bytes(b"no picture")
    os.mkfifo(home / "pipe")
    return write_tiny(home / "model", SMALL)


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    """What the commands below are compared with; nothing is left running in it."""
    return command.load(folder, sources.processor_of(folder), SIZES)


@pytest.fixture
def loaded(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The command gets the generator that is there already; the list has what it asked for."""
    calls: list[tuple] = []
    monkeypatch.setattr(command, "load", lambda *given: calls.append(given) or generator)
    return calls


def user(text: str, *pictures: Path | str) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "image", "image": str(picture)} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def answer(generator: Generator, *messages: dict[str, Any], sampling: Sampling = SAMPLING) -> Completion:
    (end,) = generator.answers([Request(messages, sampling)])
    assert isinstance(end, Completion)
    return end
