"""The options under which a model is built: mechanisms, number types, rematerialisation, adapters.

What a checkpoint is stands in `families.config.VlmConfig`. Leaf modules never see either; they take explicit sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from rave_jax.attention import AttentionDims, ContextSight, Gaze, MechanismConfig, SlidingWindow
from rave_jax.config import check_fields, require
from rave_jax.families.config import TextConfig
from rave_jax.kernels.attention import Implementation
from rave_jax.layout import ContextTokens, VisualLayout

FloatName = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots"]

MAX_RANK = 1 << 13
"""The largest rank that is built; what is larger is a slip of the pen."""


def attention_dims(text: TextConfig) -> AttentionDims:
    """Sizes of one attention layer."""
    return AttentionDims(text.num_heads, text.num_kv_heads, text.head_dim)


def window_mechanisms(text: TextConfig) -> tuple[MechanismConfig, ...]:
    """The checkpoint's own sliding window as a mechanism; empty when no layer has one."""
    if text.sliding_window is None or text.window_from >= text.num_layers:
        return ()
    return (SlidingWindow(text.sliding_window, layers=tuple(range(text.window_from, text.num_layers))),)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on named linear weights: y = x W^T + alpha / rank * (x A^T) B^T, with B = 0 at the start."""

    rank: int = 8
    """Width of the adapter."""
    alpha: float = 16.0
    """Scale of the adapter's output, divided by the rank."""
    targets: tuple[str, ...] = ("decoder.attention.query", "decoder.attention.key")
    """Linears that get an adapter, in every layer: `decoder.` or `vision.` and the path inside a layer."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.rank <= MAX_RANK, "lora.rank", self.rank, f"a number from 1 to {MAX_RANK:,}")
        require(abs(self.alpha) <= 1e6, "lora.alpha", self.alpha, "a number of at most 1e6")
        require(len(self.targets) > 0, "lora.targets", self.targets, "at least one linear")
        once = len(set(self.targets)) == len(self.targets)
        require(once, "lora.targets", self.targets, "each linear once")


@dataclass(frozen=True)
class ModelOptions:
    """How a model is built and run."""

    mechanisms: tuple[MechanismConfig, ...] = ()
    """What changes attention, in order; empty is plain attention."""
    context: ContextTokens | None = None
    """Learnable tokens behind each picture or frame, or None."""
    attention: Implementation = "auto"
    """Attention backend: reference is dense (the oracle), xla is blockwise, auto chooses and logs why."""
    remat: Remat = "none"
    """What a layer keeps for the backward pass: none recomputes nothing, full keeps only the layer's input, dots
    keeps the results of weight matmuls."""
    scan_layers: bool = True
    """Are equal layers stacked and run as one loop? It compiles fast at any depth. Without it every layer has arrays of
    its own and is compiled by itself: nothing is copied out of a stack, which is what decoding waits for on a CPU."""
    param_dtype: FloatName = "float32"
    """Number type in which parameters are stored."""
    compute_dtype: FloatName = "float32"
    """Number type of activations and matmuls; softmax, norms and rotary angles are float32 always."""
    lora: Lora | None = None
    """Low-rank adapters, or None."""

    def __post_init__(self) -> None:
        check_fields(self)
        gaze = [m for m in self.mechanisms if isinstance(m, Gaze)]
        layouts = {(m.regions, m.max_regions) for m in gaze}
        require(len(layouts) <= 1, "mechanisms", layouts, "one layout of regions (regions, max_regions) in all layers")
        served = all(m.share == "group" and m.choice == "hard" and m.descriptor != "oracle" for m in gaze)
        expected = "auto, xla or reference: the kernels serve Gaze with share group and hard choices by descriptors"
        require(served or self.attention != "pallas_tpu", "attention", self.attention, expected)

    @property
    def layout(self) -> VisualLayout:
        """How the mechanisms want pictures laid out."""
        gaze = next((m for m in self.mechanisms if isinstance(m, Gaze)), None)
        if gaze is None:
            return VisualLayout(context=self.context)
        return VisualLayout(gaze.regions, gaze.max_regions, self.context)

    @property
    def context_mechanisms(self) -> tuple[ContextSight, ...]:
        """What context tokens see, as a mechanism; empty without them. It stands last, so that the numbers of
        `mechanisms` in names of parameters do not change with it."""
        return () if self.context is None else (ContextSight(self.context),)

    @property
    def params(self) -> jnp.dtype:
        """`param_dtype` as a dtype."""
        return jnp.dtype(self.param_dtype)

    @property
    def compute(self) -> jnp.dtype:
        """`compute_dtype` as a dtype."""
        return jnp.dtype(self.compute_dtype)
