"""rave_jax: multimodal decoders with pluggable attention, trained with shardings on TPU.

`rave_jax.load` opens a model for scripts and notebooks (docs/api.md). Names are imported at their first use, so
`import rave_jax` is quick and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rave_jax.api import LoadedModel, load
    from rave_jax.config import ConfigError
    from rave_jax.data.sample import SampleError
    from rave_jax.inference import Completion, Generator, Piece, Request, Sampling, SlotConfig

__version__ = "0.1.0"

_HOMES = {
    "rave_jax.api": ("LoadedModel", "load"),
    "rave_jax.config": ("ConfigError",),
    "rave_jax.data.sample": ("SampleError",),
    "rave_jax.inference": ("Completion", "Generator", "Piece", "Request", "Sampling", "SlotConfig"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Completion",
    "ConfigError",
    "Generator",
    "LoadedModel",
    "Piece",
    "Request",
    "SampleError",
    "Sampling",
    "SlotConfig",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rave_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
