"""One answer on all processes of a job: what the first says, or what each has to say."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


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
