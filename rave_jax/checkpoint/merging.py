"""LoRA merged into the weights it adapts: W + alpha / rank * up down (arXiv 2106.09685), in float32."""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np

from rave_jax.models.config import Lora
from rave_jax.typing import NpArray

ADAPTER = ".adapter."


def is_adapter(path: str) -> bool:
    """Is this the path of an adapter's parameter?"""
    return ADAPTER in path


def adapter_of(path: str, parameters: Container[str]) -> tuple[str, str] | None:
    """Paths of the (down, up) that adapt the weight at this path, or None.

    Args:
        path: of a parameter.
        parameters: a container of all paths.
    """
    linear, _, name = path.rpartition(".")
    down, up = (f"{linear}{ADAPTER}{part}" for part in ("down", "up"))
    return (down, up) if name == "weight" and down in parameters else None


def merged(weight: NpArray, down: NpArray, up: NpArray, lora: Lora) -> NpArray:
    """The weight with its adapter in it, float32.

    Args:
        weight: [*out, *in], or [E, out, in] of experts.
        down: [rank, *in], or [E, rank, in].
        up: [*out, rank], or [E, out, rank].
        lora: gives the scale.
    """
    of_experts = down.ndim + up.ndim - 2 > weight.ndim
    factors = (up.astype(np.float32), down.astype(np.float32)) if of_experts else (_matrix(up, -1), _matrix(down, 1))
    update = np.float32(lora.alpha / lora.rank) * np.matmul(*factors)
    return weight.astype(np.float32) + update.reshape(weight.shape)


def _matrix(x: NpArray, axis: int) -> NpArray:
    """Float32 with the axes before `axis` as rows and those from it on as columns."""
    return x.astype(np.float32).reshape(math.prod(x.shape[:axis]), -1)
