"""Shapes of a model and the options under which it is built.

`VlmConfig` says what a checkpoint is: nothing in it may change without other weights. `ModelOptions` says how
we run it: mechanisms, number types, rematerialisation, adapters. Leaf modules never see either; they take
explicit sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from rave_jax import open_union
from rave_jax.attention import AttentionDims, ContextSight, MechanismConfig, SlidingWindow
from rave_jax.config import ConfigError, check_fields, require
from rave_jax.kernels.attention import Implementation
from rave_jax.layout import ContextTokens, VisualLayout

FloatName = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots"]

# The largest sizes that are built. They are several times those of any released model; what is larger is a slip of the
# pen, and is refused before it takes memory.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_HEADS = 1 << 14
MAX_VOCAB = 1 << 26
MAX_RANK = 1 << 13
MAX_SIDE = 1 << 12
MAX_INT32 = 2**31 - 1
# Computed in float32, where an inverse of larger bases is 0.
ROPE_THETA = (1e-30, 1e30)
MARKERS = ("image", "video", "vision_start", "vision_end")


def _within(config: object, limits: dict[str, int], least: int = 1) -> None:
    """Refuse fields outside least .. limit."""
    for name, limit in limits.items():
        given = getattr(config, name)
        require(least <= given <= limit, name, given, f"a number from {least} to {limit:,}")


@dataclass(frozen=True)
class TextConfig:
    """The text decoder."""

    vocab_size: int = 512
    """Rows of the embedding table."""
    hidden_size: int = 64
    """Model width D."""
    num_layers: int = 2
    """Decoder layers."""
    num_heads: int = 4
    """Query heads H."""
    num_kv_heads: int = 2
    """Key/value heads K; H is a multiple of it."""
    head_dim: int = 16
    """Width h of one head, even."""
    mlp_size: int = 128
    """Hidden width F of the SwiGLU mlp."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm of the decoder."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    mrope_section: tuple[int, ...] = ()
    """Frequencies, of head_dim / 2, that turn with the temporal, height, width position in turn; empty: all turn
    with the temporal one, which is 1-D RoPE."""
    qkv_bias: bool = True
    """Do the query, key and value projections have a bias?"""
    qk_norm: bool = False
    """Is an RMSNorm over head_dim applied to queries and keys before RoPE?"""
    tie_embeddings: bool = True
    """Is the embedding table the output head too?"""
    sliding_window: int | None = None
    """Keys a query may see in layers from `window_from` on; None: all of its document."""
    window_from: int = 0
    """First layer that uses the sliding window."""
    max_position: int = 32768
    """Positions the model was made for; stated in the checkpoint, not enforced."""

    def __post_init__(self) -> None:
        check_fields(self)
        widths = dict.fromkeys(("hidden_size", "head_dim", "mlp_size"), MAX_WIDTH)
        heads = dict.fromkeys(("num_heads", "num_kv_heads"), MAX_HEADS)
        _within(self, {"vocab_size": MAX_VOCAB, "num_layers": MAX_LAYERS, "max_position": MAX_INT32} | widths | heads)
        _within(self, {"window_from": MAX_INT32}, least=0)
        divides = self.num_heads % self.num_kv_heads == 0
        require(divides, "num_heads", self.num_heads, f"a multiple of num_kv_heads {self.num_kv_heads}")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, for rotary halves")
        section = self.mrope_section
        covers = not section or (sum(section) == self.head_dim // 2 and min(section) >= 0)
        require(covers, "mrope_section", section, f"numbers that add up to head_dim / 2 = {self.head_dim // 2}")
        _check_norm_and_rope(self)
        window_ok = self.sliding_window is None or 1 <= self.sliding_window <= MAX_INT32
        require(window_ok, "sliding_window", self.sliding_window, f"1 to {MAX_INT32:,}, or None")

    @property
    def attention_dims(self) -> AttentionDims:
        """Sizes of one attention layer."""
        return AttentionDims(self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def window_mechanisms(self) -> tuple[MechanismConfig, ...]:
        """The checkpoint's own sliding window as a mechanism; empty when no layer has one."""
        if self.sliding_window is None or self.window_from >= self.num_layers:
            return ()
        return (SlidingWindow(self.sliding_window, layers=tuple(range(self.window_from, self.num_layers))),)


def _check_norm_and_rope(config: TextConfig | VisionConfig) -> None:
    eps, theta = config.rms_norm_eps, config.rope_theta
    require(0 <= eps <= 1, "rms_norm_eps", eps, "a number from 0 to 1")
    require(
        ROPE_THETA[0] <= theta <= ROPE_THETA[1], "rope_theta", theta, "a number from {:g} to {:g}".format(*ROPE_THETA)
    )


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and the merger after it."""

    depth: int = 2
    """Blocks of the tower."""
    hidden_size: int = 32
    """Width of the tower."""
    num_heads: int = 2
    """Attention heads of each block."""
    mlp_size: int = 64
    """Hidden width of the SwiGLU mlp."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    temporal_patch_size: int = 2
    """Frames in a patch; a still image is repeated."""
    merge_size: int = 2
    """Side, in patches, of the square that becomes one visual token."""
    window_size: int = 112
    """Side of an attention window in pixels."""
    full_attention_blocks: tuple[int, ...] = (1,)
    """Blocks that attend over the whole frame; the others stay inside windows."""
    in_channels: int = 3
    """Colour channels."""
    out_size: int = 64
    """Width of a visual token after the merger: the decoder's hidden_size."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm of the tower."""
    rope_theta: float = 1e4
    """Base of the rotary frequencies of rows and columns."""
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each colour channel, of values in 0..1, subtracted before the tower."""
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each colour channel, divided by after the mean is subtracted."""

    def __post_init__(self) -> None:
        check_fields(self)
        sides = dict.fromkeys(("patch_size", "merge_size", "temporal_patch_size", "in_channels"), MAX_SIDE)
        widths = dict.fromkeys(("hidden_size", "mlp_size", "out_size", "window_size"), MAX_WIDTH)
        _within(self, {"depth": MAX_LAYERS, "num_heads": MAX_HEADS} | widths | sides)
        divides = self.hidden_size % self.num_heads == 0 and self.head_dim % 4 == 0
        require(divides, "hidden_size", self.hidden_size, f"num_heads {self.num_heads} times a multiple of 4")
        unit = self.patch_size * self.merge_size
        require(self.window_size >= unit, "window_size", self.window_size, f"at least one merge unit of {unit} pixels")
        known = all(0 <= n < self.depth for n in self.full_attention_blocks)
        require(known, "full_attention_blocks", self.full_attention_blocks, f"numbers from 0 to {self.depth - 1}")
        for name in ("pixel_mean", "pixel_std"):
            given = getattr(self, name)
            require(len(given) == self.in_channels, name, given, f"one number for each of {self.in_channels} channels")
        require(min(self.pixel_std) > 0, "pixel_std", self.pixel_std, "numbers above 0")
        _check_norm_and_rope(self)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_width(self) -> int:
        """C: numbers in a flattened patch (channel, temporal, row, col)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.merge_size**2

    @property
    def window_patches(self) -> int:
        """The most patches a window can hold. Windows are whole merge units, as many as fit in window_size."""
        return (self.window_size // self.merge_size // self.patch_size * self.merge_size) ** 2


@dataclass(frozen=True)
class VlmConfig:
    """One vision-language (or, without a tower, language) model."""

    text: TextConfig = TextConfig()
    """The text decoder."""
    vision: VisionConfig | None = VisionConfig()
    """The vision tower, or None for a text model."""
    image_token_id: int = 151655
    """Placeholder id of an image's visual tokens."""
    video_token_id: int = 151656
    """Placeholder id of a video's visual tokens."""
    vision_start_token_id: int = 151652
    """Id before an image or video."""
    vision_end_token_id: int = 151653
    """Id after an image or video."""
    eos_token_ids: tuple[int, ...] = (151645,)
    """Ids that end an answer."""
    tokens_per_second: float = 2.0
    """Temporal positions in one second of video."""
    family: str = "qwen2_5_vl"
    """Name of the model family (HF `model_type`), which knows the checkpoint's keys."""

    def __post_init__(self) -> None:
        check_fields(self)
        _within(self, dict.fromkeys((f"{name}_token_id" for name in MARKERS), MAX_INT32), least=-1)
        ids = self.eos_token_ids
        require(all(0 <= n <= MAX_INT32 for n in ids), "eos_token_ids", ids, f"token ids, 0 to {MAX_INT32:,}")
        require(0 < self.tokens_per_second <= 1e6, "tokens_per_second", self.tokens_per_second, "above 0, at most 1e6")
        if self.vision is not None:
            same = self.vision.out_size == self.text.hidden_size
            require(same, "vision.out_size", self.vision.out_size, f"text.hidden_size {self.text.hidden_size}")


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


def _check_layouts(mechanisms: Sequence[MechanismConfig]) -> None:
    """Refuse mechanisms that ask for different regions, or that cannot stand in a model with regions."""
    asking = [mechanism for mechanism in mechanisms if mechanism.layout.regions is not None]
    for other in asking[1:]:
        if other.layout != asking[0].layout:
            raise ConfigError(
                f"mechanisms: {asking[0].called} and {other.called} ask for different regions "
                f"({asking[0].layout.regions}, max_regions {asking[0].layout.max_regions}, and {other.layout.regions}, "
                f"max_regions {other.layout.max_regions}): a picture has one layout of regions in all layers; give "
                "both the same regions and max_regions"
            )
    counted = [mechanism for mechanism in mechanisms if type(mechanism).reading is not MechanismConfig.reading]
    for first, second in itertools.combinations(counted, 2):
        if "all" in (first.layers, second.layers) or set(first.layers) & set(second.layers):
            raise ConfigError(
                f"mechanisms: {first.called} and {second.called} share a layer, and each chooses what queries read of "
                "pictures (it declares `reading`), which only one mechanism of a layer may; give them different layers"
            )
    for mechanism in mechanisms:
        if asking and mechanism.needs_order:
            raise ConfigError(
                f"mechanisms: {mechanism.called} cannot share a model with {asking[0].called}, not even in other "
                f"layers: it finds tokens by their place in the row, and for {asking[0].called} the cache keeps them "
                "region by region; remove one of them"
            )
