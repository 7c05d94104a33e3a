"""One answer on all processes of a job: what the first says, or what each has to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rave_jax import config as configs
from rave_jax.config import ConfigError


def from_first[T](value: T) -> T:
    """The first process's value, on every process. JSON-ready; every process calls it."""
    return value if jax.process_count() == 1 else json.loads(_gathered(json.dumps(value))[0])


def from_all(value: Any) -> list[Any]:
    """The values of all processes in their order, on every process. JSON-ready; every process calls it."""
    return [value] if jax.process_count() == 1 else [json.loads(text) for text in _gathered(json.dumps(value))]


def _gathered(text: str) -> list[str]:
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def on_first[T](work: Callable[[], T], *errors: type[Exception]) -> T:
    """What the first process gets from its work, or the error that it raises there, on every process.

    Args:
        work: called on the first process alone; returns what JSON can say.
        errors: what it may raise; each takes one message.
    """
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": work()}
        except errors as error:
            if jax.process_count() == 1:
                raise
            kind = next(number for number, kind in enumerate(errors) if isinstance(error, kind))
            answer = {"kind": kind, "message": str(error)}
    answer = from_first(answer)
    if "kind" in answer:
        raise errors[answer["kind"]](answer["message"])
    return answer["value"]


MOST_NAMED = 3
"""Fields that a message names."""


def check_same_config(config: Any, *aside: str) -> None:
    """Refuse a job whose processes have different configs: each traces its own program, and nothing else would tell.

    Args:
        config: of this process.
        aside: fields that may differ.

    Raises:
        ConfigError: names a process and the fields; the same on all processes.
    """
    if jax.process_count() == 1:
        return
    found = from_all({k: v for k, v in configs.without_folders(configs.to_json(config)).items() if k not in aside})
    for process, theirs in enumerate(found):
        lines = [
            line
            for name in found[0]
            for line in configs.differing(name, found[0][name], theirs.get(name), "on process 0")
        ]
        if lines:
            more = f" and {len(lines) - MOST_NAMED} more" if len(lines) > MOST_NAMED else ""
            raise ConfigError(
                f"process {process} has another config than process 0: {'; '.join(lines[:MOST_NAMED])}{more}; start "
                "all processes with one command and one copy of the code"
            )
