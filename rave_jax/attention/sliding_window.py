"""Sliding window: a query sees at most the last `window` tokens of its document (Qwen2's `use_sliding_window`)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.batch import TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import MaskCodes


@dataclass(frozen=True)
class SlidingWindow(MechanismConfig):
    """Each query sees itself and the `window` - 1 tokens before it."""

    window: int = 4096
    """Number of keys a query may see, itself included."""
    layers: Layers = "all"
    """Decoder layers that use the window, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.window < 2**31, "window", self.window, f"a number of tokens from 1 to {2**31 - 1:,}")

    def build(self, dims: AttentionDims, key: jax.Array) -> Window:
        """The mechanism of one layer."""
        return Window(self)


class Window(Mechanism):
    """Closes the causal interval from below. It counts in `order`, so that has to be the plain one."""

    NEEDS = ("order",)

    def __init__(self, config: SlidingWindow):
        self.config = config

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """lo = max(lo, hi - window + 1): hi of a causal query is its own place."""
        return codes._replace(lo=jnp.maximum(codes.lo, codes.hi - self.config.window + 1))
