"""Whole programs of ours that tests start, each an interpreter of its own: what they find in their environment."""

from __future__ import annotations

import os
from pathlib import Path

import jax

REPO = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """Compiled as the tests here are, so that their numbers can be compared, and nothing twice: programs of one test
    are much alike. `more` is added."""
    quick = str(int(jax.config.read("jax_disable_most_optimizations")))
    ours = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPO),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": quick,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | ours | more
