"""The options under which a model is built: mechanisms, number types, rematerialisation, adapters.

What a checkpoint is stands in `families.config.VlmConfig`. Leaf modules never see either; they take explicit sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from rave_jax import open_union
from rave_jax.attention import AttentionDims, ContextSight, MechanismConfig, SlidingWindow
from rave_jax.attention.declared import LayeredConfig
from rave_jax.config import ConfigError, check_fields, require
from rave_jax.families.config import TextConfig
from rave_jax.kernels.attention import Implementation
from rave_jax.layout import ContextTokens, VisualLayout

FloatName = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "attention", "dots", "dots_and_attention", "all_dots", "offload"]

MAX_RANK = 1 << 13
"""The largest rank that is built; a larger one is taken for a typing error."""


def attention_dims(text: TextConfig) -> AttentionDims:
    """Sizes of one attention layer."""
    return AttentionDims(text.num_heads, text.num_kv_heads, text.head_dim, text.hidden_size)


def window_mechanisms(text: TextConfig) -> tuple[MechanismConfig, ...]:
    """The checkpoint's own sliding window as a mechanism; empty when no layer has one."""
    if text.sliding_window is None or text.window_from >= text.num_layers:
        return ()
    return (SlidingWindow(text.sliding_window, layers=tuple(range(text.window_from, text.num_layers))),)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear weights: y = x W^T + alpha / rank * (x A^T) B^T, with B = 0 at the start."""

    rank: int = 8
    """Width of the adapter."""
    alpha: float = 16.0
    """Scale of the adapter's output, divided by the rank."""
    targets: tuple[str, ...] = ("decoder.attention.query", "decoder.attention.key")
    """Regular expressions of linears that get an adapter. Each has to match a whole path: `decoder.` or `vision.` and
    the path inside a layer, such as `decoder\\.mlp\\..*`, for all layers, experts and router among them; one behind the
    tower's, such as `vision.merger.first`; `lm_head`, also where the head is the embedding table; or `embed`."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.rank <= MAX_RANK, "lora.rank", self.rank, f"a number from 1 to {MAX_RANK:,}")
        require(abs(self.alpha) <= 1e6, "lora.alpha", self.alpha, "a number of at most 1e6")
        require(len(self.targets) > 0, "lora.targets", self.targets, "at least one linear")
        once = len(set(self.targets)) == len(self.targets)
        require(once, "lora.targets", self.targets, "each linear once")
        for number, target in enumerate(self.targets):
            try:
                re.compile(target)
            except re.error as error:
                wanted = f"lora.targets.{number} is {target!r}, expected a path or a regular expression: {error}"
                raise ConfigError(wanted) from error


@dataclass(frozen=True)
class ExtraMlp:
    """A small mlp beside that of every decoder layer, 2 width D parameters a layer, zero at the start."""

    width: int = 8
    """Numbers between its two linears."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.width <= MAX_RANK, "extra_mlp.width", self.width, f"a number from 1 to {MAX_RANK:,}")


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
    """What a layer keeps for the backward pass beside its input; the rest is computed again. none keeps everything,
    full nothing, attention the output of attention, dots the results of weight matmuls, dots_and_attention both,
    all_dots the results of all matmuls. offload keeps nothing, and moves the layer's input to the host's memory."""
    vision_remat: Remat | None = None
    """What a block of the vision tower keeps; None is as `remat`."""
    sequence_parallel: bool = False
    """Are tokens of the decoder's residual stream split over the mesh axis `tensor`? What a layer keeps for the
    backward pass is then divided by `tensor`. Without that axis it changes nothing."""
    scan_layers: bool = True
    """Are equal layers stacked and run as one loop? It compiles fast at any depth. Without it every layer has arrays of
    its own and is compiled by itself: nothing is copied out of a stack, which is what decoding waits for on a CPU."""
    param_dtype: FloatName = "float32"
    """Number type in which parameters are stored."""
    compute_dtype: FloatName = "float32"
    """Number type of activations and matmuls; softmax, norms and rotary angles are float32 always."""
    lora: Lora | None = None
    """Low-rank adapters, or None."""
    extra_mlp: ExtraMlp | None = None
    """A small mlp beside that of every decoder layer, or None."""

    def __post_init__(self) -> None:
        check_fields(self)
        for number, mechanism in enumerate(self.mechanisms):
            wrong = open_union.against_member(type(mechanism), MechanismConfig)
            if wrong is not None:
                raise ConfigError(f"mechanisms.{number}: {wrong}")
            if mechanism.layout.context is not None:
                raise ConfigError(
                    f"mechanisms.{number}: the layout of {mechanism.called} has context tokens, which are the "
                    "model's option `context`; leave them out of the layout"
                )
            against = mechanism.against_kernels if self.attention == "pallas_tpu" else None
            if against is not None:
                raise ConfigError(
                    f"attention is 'pallas_tpu', which cannot serve {mechanism.called}: {against}; set attention to "
                    f"'auto', 'xla' or 'reference', or change {mechanism.called}"
                )
        _check_layouts(self.mechanisms)

    @property
    def layout(self) -> VisualLayout:
        """How the mechanisms want pictures laid out."""
        layout = next((m.layout for m in self.mechanisms if m.layout.regions is not None), VisualLayout())
        return dataclasses.replace(layout, context=self.context)

    @property
    def laid_out(self) -> tuple[LayeredConfig, ...]:
        """The mechanisms as they are built beside that layout: some may make other regions for themselves."""
        layout = dataclasses.replace(self.layout, context=None)
        return tuple(mechanism.in_layout(layout) for mechanism in self.mechanisms)

    @property
    def context_mechanisms(self) -> tuple[ContextSight, ...]:
        """What context tokens see, as a mechanism; empty without them. It stands last, so that the numbers of
        `mechanisms` in names of parameters do not change with it."""
        return () if self.context is None else (ContextSight(self.context),)

    @property
    def reads_class_token(self) -> bool:
        """Does a mechanism read what the vision tower's class token looks at?"""
        return any(mechanism.reads_class_token for mechanism in self.mechanisms)

    @property
    def tower_remat(self) -> Remat:
        """What a block of the tower keeps."""
        return self.remat if self.vision_remat is None else self.vision_remat

    @property
    def params(self) -> jnp.dtype:
        """`param_dtype` as a dtype."""
        return jnp.dtype(self.param_dtype)

    @property
    def compute(self) -> jnp.dtype:
        """`compute_dtype` as a dtype."""
        return jnp.dtype(self.compute_dtype)


def _check_layouts(mechanisms: Sequence[MechanismConfig]) -> None:
    """Refuse mechanisms that ask for regions that they cannot have, or that cannot stand in a model with regions."""
    asking = [mechanism for mechanism in mechanisms if mechanism.layout.regions is not None]
    for other in asking[1:]:
        other.in_layout(asking[0].layout)
    counted = [mechanism for mechanism in mechanisms if type(mechanism).reading is not MechanismConfig.reading]
    for first, second in itertools.combinations(counted, 2):
        if "all" in (first.layers, second.layers) or set(first.layers) & set(second.layers):
            raise ConfigError(
                f"mechanisms: {first.called} and {second.called} share a layer, and each chooses what queries read of "
                "pictures (it declares `reading`), which only one mechanism of a layer may; give them different layers"
            )
    for mechanism in mechanisms:
        if asking and mechanism.drops:
            raise ConfigError(
                f"mechanisms: {mechanism.called} cannot share a model with {asking[0].called}, not even in other "
                f"layers: visual tokens leave after its layers ({mechanism.layers}), and for {asking[0].called} the "
                "cache keeps them region by region in all layers; remove one of them"
            )
        counting = next((one for one in mechanisms if one.needs_all), None)
        if counting is not None and mechanism.drops:
            raise ConfigError(
                f"mechanisms: {mechanism.called} cannot share a model with {counting.called}, not even in other "
                f"layers: visual tokens leave after its layers ({mechanism.layers}), and {counting.called} counts all "
                "tokens of a document in blocks; remove one of them"
            )
        if asking and mechanism.needs_order:
            raise ConfigError(
                f"mechanisms: {mechanism.called} cannot share a model with {asking[0].called}, not even in other "
                f"layers: it finds tokens by their place in the row, and for {asking[0].called} the cache keeps them "
                "region by region; remove one of them"
            )
