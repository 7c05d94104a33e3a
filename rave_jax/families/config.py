"""What a checkpoint is: nothing in these records may change without other weights.

`VlmConfig` is made by a family from an HF config. How a model is run (mechanisms, number types, adapters) is
`models.config.ModelOptions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rave_jax.config import ConfigError, check_fields, require

# The largest sizes that are built. They are several times those of any released model; what is larger is a slip of the
# pen, and is refused before it takes memory.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_HEADS = 1 << 14
MAX_VOCAB = 1 << 26
MAX_EXPERTS = 1 << 14
MAX_SIDE = 1 << 12
MAX_INT32 = 2**31 - 1
# Computed in float32, where an inverse of larger bases is 0.
ROPE_THETA = (1e-30, 1e30)
MARKERS = ("image", "video", "vision_start", "vision_end")


def within(config: object, limits: dict[str, int], least: int = 1) -> None:
    """Refuse fields outside least .. limit."""
    for name, limit in limits.items():
        given = getattr(config, name)
        require(least <= given <= limit, name, given, f"a number from {least} to {limit:,}")


@dataclass(frozen=True)
class DeltaConfig:
    """Layers of the gated delta rule (arXiv 2412.06464) in place of attention."""

    layers: tuple[int, ...] = (0,)
    """Decoder layers that have it, in order; the others attend."""
    key_heads: int = 2
    """Heads of queries and keys."""
    value_heads: int = 4
    """Heads of values, a multiple of key_heads."""
    key_dim: int = 16
    """Width of a query and of a key of one head."""
    value_dim: int = 16
    """Width of a value of one head."""
    conv_width: int = 4
    """Tokens that the causal convolution before the rule sums over, the token itself among them."""

    def __post_init__(self) -> None:
        check_fields(self)
        heads = dict.fromkeys(("key_heads", "value_heads"), MAX_HEADS)
        within(self, heads | dict.fromkeys(("key_dim", "value_dim"), MAX_WIDTH) | {"conv_width": MAX_SIDE})
        within(self, {"conv_width": MAX_SIDE}, least=2)
        divides = self.value_heads % self.key_heads == 0
        require(divides, "value_heads", self.value_heads, f"a multiple of key_heads {self.key_heads}")
        ordered = self.layers == tuple(sorted(set(self.layers)))
        require(len(self.layers) > 0 and ordered, "layers", self.layers, "numbers of layers, each once and in order")

    @property
    def channels(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class LinearRope:
    """Every rotary frequency is divided by one factor: positions are interpolated (arXiv 2306.15595)."""

    factor: float = 1.0
    """Divides the frequencies."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.factor > 0, "factor", self.factor, "above 0")


@dataclass(frozen=True)
class SmoothRope:
    """Slow rotary frequencies are divided by a factor, fast ones stay, and those between are mixed (Llama 3.1, arXiv
    2407.21783). What counts is how often a frequency turns within `original_max_position` positions."""

    factor: float = 8.0
    """Divides the frequencies that turn at most `low_factor` times."""
    low_factor: float = 1.0
    """Turns up to which a frequency is divided."""
    high_factor: float = 4.0
    """Turns from which a frequency stays as it is."""
    original_max_position: int = 8192
    """Positions that the model was trained with before the scaling."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.factor > 0, "factor", self.factor, "above 0")
        require(self.low_factor > 0, "low_factor", self.low_factor, "above 0")
        above = self.high_factor > self.low_factor
        require(above, "high_factor", self.high_factor, f"above low_factor {self.low_factor}")
        within(self, {"original_max_position": MAX_INT32})


@dataclass(frozen=True)
class DynamicRope:
    """Rotary frequencies stay as they are in texts of at most `longest` positions ("dynamic NTK").

    Longer texts are refused: transformers divides the frequencies by more the longer a text has become, so that the
    keys of one text have turned at different ones.
    """

    factor: float = 1.0
    """How strongly frequencies of longer texts are divided; stated in the checkpoint, not computed with."""
    longest: int = 32768
    """Most tokens of a text."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.factor > 0, "factor", self.factor, "above 0")
        within(self, {"longest": MAX_INT32})


RopeScaling = LinearRope | SmoothRope | DynamicRope


class LayerKind(NamedTuple):
    """What sets a decoder layer apart from others of its model.

    Fields:
        mlp: one mlp for all tokens, or experts that a router chooses.
        mixer: what tokens learn of each other by: softmax attention, or the gated delta rule.
    """

    mlp: Literal["dense", "experts"] = "dense"
    mixer: Literal["attention", "delta"] = "attention"


@dataclass(frozen=True)
class ExpertsConfig:
    """Many mlps in place of one, of which a router chooses some for each token."""

    count: int = 8
    """Experts E."""
    chosen: int = 2
    """Experts that each token goes to."""
    mlp_size: int = 32
    """Hidden width F of one expert's SwiGLU mlp."""
    normalise: bool = True
    """Are the probabilities of the chosen experts divided by their sum?"""
    balance: float = 0.001
    """Weight of the load-balancing loss in training."""
    every: int = 1
    """Layers n with n + 1 a multiple of it have experts."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have one mlp whatever `every` says."""

    def __post_init__(self) -> None:
        check_fields(self)
        within(self, {"count": MAX_EXPERTS, "mlp_size": MAX_WIDTH, "every": MAX_LAYERS, "chosen": self.count})
        require(0 <= self.balance <= 1e6, "balance", self.balance, "a number from 0 to 1e6")

    def in_layer(self, layer: int) -> bool:
        """Has this layer experts?"""
        return layer not in self.dense_layers and (layer + 1) % self.every == 0


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
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies are scaled for longer contexts; None: not at all."""
    mrope_section: tuple[int, ...] = ()
    """Frequencies, of rotary_dim / 2, that turn with the temporal, height, width position in turn; empty: all turn
    with the temporal one, which is 1-D RoPE."""
    mrope_interleaved: bool = False
    """Do the frequencies of `mrope_section` take turns, temporal, height, width, instead of standing side by side?"""
    rotary_part: int | None = None
    """Numbers of a head that turn, the first of them, even; None: all of head_dim."""
    qkv_bias: bool = True
    """Do the query, key and value projections have a bias?"""
    qk_norm: bool = False
    """Is an RMSNorm over head_dim applied to queries and keys before RoPE?"""
    output_gate: bool = False
    """Are the heads' outputs multiplied by a sigmoid of numbers that the query projection gives beside the queries?"""
    norm_plus_one: bool = False
    """Do RMSNorms multiply by 1 + weight?"""
    tie_embeddings: bool = True
    """Is the embedding table the output head too?"""
    sliding_window: int | None = None
    """Keys a query may see in layers from `window_from` on; None: all of its document."""
    window_from: int = 0
    """First layer that uses the sliding window."""
    max_position: int = 32768
    """Positions the model was made for; stated in the checkpoint, not enforced."""
    family: str = ""
    """Name of the text family whose config states the decoder inside a model with pictures; empty where the model's
    own family does."""
    experts: ExpertsConfig | None = None
    """Experts in place of the mlp of some layers or all; None: every layer has one mlp."""
    delta: DeltaConfig | None = None
    """Layers with the gated delta rule; None: every layer attends."""

    def __post_init__(self) -> None:
        check_fields(self)
        widths = dict.fromkeys(("hidden_size", "head_dim", "mlp_size"), MAX_WIDTH)
        heads = dict.fromkeys(("num_heads", "num_kv_heads"), MAX_HEADS)
        within(self, {"vocab_size": MAX_VOCAB, "num_layers": MAX_LAYERS, "max_position": MAX_INT32} | widths | heads)
        within(self, {"window_from": MAX_INT32}, least=0)
        divides = self.num_heads % self.num_kv_heads == 0
        require(divides, "num_heads", self.num_heads, f"a multiple of num_kv_heads {self.num_kv_heads}")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, for rotary halves")
        section = self.mrope_section
        part, half = self.rotary_part, self.rotary_dim // 2
        turns = part is None or (2 <= part <= self.head_dim and part % 2 == 0)
        require(turns, "rotary_part", part, f"an even number from 2 to head_dim {self.head_dim}, or None")
        covers = not section or (sum(section) == half and min(section) >= 0)
        require(covers, "mrope_section", section, f"numbers that add up to rotary_dim / 2 = {half}")
        three = not self.mrope_interleaved or len(section) == 3
        require(three, "mrope_section", section, "three numbers where mrope_interleaved is true")
        check_norm_and_rope(self)
        window_ok = self.sliding_window is None or 1 <= self.sliding_window <= MAX_INT32
        require(window_ok, "sliding_window", self.sliding_window, f"1 to {MAX_INT32:,}, or None")
        if self.delta is not None:
            known = all(0 <= n < self.num_layers for n in self.delta.layers)
            require(known, "delta.layers", self.delta.layers, f"numbers from 0 to {self.num_layers - 1}")
            some = len(self.delta.layers) < self.num_layers
            require(some, "delta.layers", self.delta.layers, "at least one layer less than the model has")

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that turn with positions."""
        return self.head_dim if self.rotary_part is None else self.rotary_part

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that attend: those that mechanisms may be in."""
        return tuple(n for n, kind in enumerate(self.layer_kinds) if kind.mixer == "attention")

    @property
    def longest(self) -> int | None:
        """Most tokens of a document that the decoder computes; None: any number."""
        return self.rope_scaling.longest if isinstance(self.rope_scaling, DynamicRope) else None

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each decoder layer."""
        experts, deltas = self.experts, () if self.delta is None else self.delta.layers
        return tuple(
            LayerKind(
                "experts" if experts is not None and experts.in_layer(n) else "dense",
                "delta" if n in deltas else "attention",
            )
            for n in range(self.num_layers)
        )


def check_norm_and_rope(config: Any) -> None:
    """Refuse an `rms_norm_eps` or a `rope_theta` that cannot be computed with."""
    eps, theta = config.rms_norm_eps, config.rope_theta
    require(0 <= eps <= 1, "rms_norm_eps", eps, "a number from 0 to 1")
    require(
        ROPE_THETA[0] <= theta <= ROPE_THETA[1], "rope_theta", theta, "a number from {:g} to {:g}".format(*ROPE_THETA)
    )


@dataclass(frozen=True)
class TowerConfig(ABC):
    """What every vision tower has. A family adds the fields of its own tower in a subclass."""

    depth: int = 2
    """Blocks of the tower."""
    hidden_size: int = 32
    """Width of the tower."""
    num_heads: int = 2
    """Attention heads of each block."""
    mlp_size: int = 64
    """Hidden width of the mlp."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    in_channels: int = 3
    """Colour channels."""
    out_size: int = 64
    """Width of a visual token as it leaves the tower: the decoder's hidden_size."""
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each colour channel, of values in 0..1, subtracted before the tower."""
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each colour channel, divided by after the mean is subtracted."""

    def __post_init__(self) -> None:
        check_fields(self)
        widths = dict.fromkeys(("hidden_size", "mlp_size", "out_size"), MAX_WIDTH)
        sides = dict.fromkeys(("patch_size", "in_channels"), MAX_SIDE)
        within(self, {"depth": MAX_LAYERS, "num_heads": MAX_HEADS} | widths | sides)
        for name in ("pixel_mean", "pixel_std"):
            given = getattr(self, name)
            require(len(given) == self.in_channels, name, given, f"one number for each of {self.in_channels} channels")
        require(min(self.pixel_std) > 0, "pixel_std", self.pixel_std, "numbers above 0")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    @abstractmethod
    def patch_width(self) -> int:
        """C: numbers in a flattened patch."""

    @property
    def class_looks(self) -> bool:
        """Can its tower say what its class token looks at (`ImageFeatures.looks`)?"""
        return False

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return 1

    @property
    def window_patches(self) -> int:
        """What the tower wants the number of patches of a row to be a multiple of."""
        return 1

    @property
    def mixed(self) -> int:
        """Merge units that a visual token is a sum of; 0 where each unit is a visual token."""
        return 0

    @property
    def spread(self) -> int:
        """The most merge units for each visual token of a picture."""
        return 1

    @property
    def deep_layers(self) -> int:
        """How many decoder layers, from the first on, get features of the tower added behind them (DeepStack)."""
        return 0


class PatchSizes(NamedTuple):
    """What arrays of patches have to be like for a model; all 1 without a tower, so that empty arrays have a shape.

    Fields:
        numbers: C, numbers in a flattened patch.
        merge: patches in a merge unit, which becomes one visual token.
        window: patches of a row are a multiple of it: what a full attention window of the tower holds.
        mixed: K, units that a visual token is a sum of (`Patches.source`); 0 where each unit is a visual token.
        spread: the most units for each visual token of a picture.
    """

    numbers: int = 1
    merge: int = 1
    window: int = 1
    mixed: int = 0
    spread: int = 1


@dataclass(frozen=True)
class VlmConfig:
    """One vision-language (or, without a tower, language) model."""

    text: TextConfig = TextConfig()
    """The text decoder."""
    vision: TowerConfig | None = None
    """The vision tower, or None for a text model."""
    image_token_id: int = -1
    """Placeholder id of an image's visual tokens; -1 where a model has none, as in the other ids."""
    video_token_id: int = -1
    """Placeholder id of a video's visual tokens."""
    vision_start_token_id: int = -1
    """Id before an image or video."""
    vision_end_token_id: int = -1
    """Id after an image or video."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end an answer."""
    tokens_per_second: float = 2.0
    """Temporal positions in one second of video."""
    family: str = field(kw_only=True)
    """Name of the model family (HF `model_type`)."""

    def __post_init__(self) -> None:
        check_fields(self)
        within(self, dict.fromkeys((f"{name}_token_id" for name in MARKERS), MAX_INT32), least=-1)
        ids = self.eos_token_ids
        require(all(0 <= n <= MAX_INT32 for n in ids), "eos_token_ids", ids, f"token ids, 0 to {MAX_INT32:,}")
        require(0 < self.tokens_per_second <= 1e6, "tokens_per_second", self.tokens_per_second, "above 0, at most 1e6")
        if self.vision is not None:
            same = self.vision.out_size == self.text.hidden_size
            require(same, "vision.out_size", self.vision.out_size, f"text.hidden_size {self.text.hidden_size}")
        fits = self.deep_layers <= self.text.num_layers
        require(fits, "vision.deep_layers", self.deep_layers, f"at most text.num_layers {self.text.num_layers}")

    @property
    def deep_layers(self) -> int:
        """How many decoder layers, from the first on, get features of the tower added behind them; 0 without any."""
        return 0 if self.vision is None else self.vision.deep_layers

    @property
    def patch_sizes(self) -> PatchSizes:
        """What arrays of patches have to be like."""
        tower = self.vision
        if tower is None:
            return PatchSizes()
        return PatchSizes(tower.patch_width, tower.merge_unit, tower.window_patches, tower.mixed, tower.spread)


def tower_of[T: TowerConfig](config: VlmConfig, kind: type[T]) -> T:
    """The config of a model's tower.

    Raises:
        ConfigError: the model has none, or another family's.
    """
    if not isinstance(config.vision, kind):
        found = type(config.vision).__name__
        raise ConfigError(f"vision is {found}, expected a {kind.__name__} of {config.family}: its models have a tower")
    return config.vision
