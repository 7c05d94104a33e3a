"""Plain vision transformers with a two-layer projector behind them: CLIP's (arXiv 2103.00020) and SigLIP's (arXiv
2303.15343). The half that imports no jax: config, tensors and patches; `models/vit.py` computes.

CLIP's has a class token in front of the patches of a picture and a norm before the first block, SigLIP's a bias in the
patch projection. Pictures have one size, and each place of a picture a learned embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rave_jax.batch import Patches
from rave_jax.config import ConfigError, require
from rave_jax.families.base import TensorRule
from rave_jax.families.config import MAX_HEADS, MAX_LAYERS, MAX_SIDE, MAX_WIDTH, TowerConfig, within
from rave_jax.families.hf import HfConfig, integer, number, only
from rave_jax.families.shared.tower_tensors import layer_norm, linear
from rave_jax.layout import Box
from rave_jax.typing import NpArray, UInt8

VitKind = Literal["clip", "siglip"]
KINDS: dict[str, VitKind] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
"""`model_type` of an HF config to ours."""
ACTIVATIONS = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
"""`hidden_act` of a config that leaves it out."""
EPSILON = {"clip": 1e-5, "siglip": 1e-6}
"""`layer_norm_eps` of a config that leaves it out."""
SIZES = {
    "hidden_size": ("hidden_size", MAX_WIDTH),
    "mlp_size": ("intermediate_size", MAX_WIDTH),
    "depth": ("num_hidden_layers", MAX_LAYERS),
    "num_heads": ("num_attention_heads", MAX_HEADS),
    "patch_size": ("patch_size", MAX_SIDE),
    "image_size": ("image_size", MAX_WIDTH),
}
"""Fields and their keys."""


@dataclass(frozen=True)
class VitConfig(TowerConfig):
    """A plain vision transformer and the projector after it."""

    kind: VitKind = "clip"
    """clip: class token, norm before the blocks. siglip: neither, but a bias in the patch projection."""
    image_size: int = 56
    """Side of a picture in pixels, a multiple of patch_size or a little more; what is over at the edges is cut off."""
    activation: str = "quick_gelu"
    """Between the two linears of each mlp."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""
    feature_layers: tuple[int, ...] = (1,)
    """Blocks after which the hidden states are taken that the projector reads side by side; 0: before the first."""
    class_feature: bool = False
    """Is the class token a visual token, the first of each picture?"""
    projector_bias: bool = True
    """Do the linears of the projector have a bias?"""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, {"image_size": MAX_WIDTH})
        divides = self.hidden_size % self.num_heads == 0
        require(divides, "hidden_size", self.hidden_size, f"a multiple of num_heads {self.num_heads}")
        require(self.side > 0, "image_size", self.image_size, f"at least patch_size {self.patch_size}")
        known = self.feature_layers and all(0 <= n <= self.depth for n in self.feature_layers)
        require(bool(known), "feature_layers", self.feature_layers, f"numbers from 0 to {self.depth}")
        names = tuple(sorted({*ACTIVATIONS.values(), "gelu"}))
        require(self.activation in names, "activation", self.activation, f"one of {', '.join(names)}")
        require(0 <= self.layer_norm_eps <= 1, "layer_norm_eps", self.layer_norm_eps, "a number from 0 to 1")
        has_one = self.class_token or not self.class_feature
        require(has_one, "class_feature", self.class_feature, f"false: {self.kind} has no class token")

    @property
    def patch_width(self) -> int:
        """C: numbers in a flattened patch (channel, row, col)."""
        return self.in_channels * self.patch_size**2

    @property
    def mixed(self) -> int:
        """1 where no visual token is made of the class token, so that visual tokens are chosen among the units."""
        return int(self.class_token and not self.class_feature)

    @property
    def spread(self) -> int:
        """A picture has at most one unit beside its visual tokens."""
        return 1 + self.mixed

    @property
    def class_token(self) -> bool:
        """Does a class token stand in front of the patches of a picture?"""
        return self.kind == "clip"

    @property
    def class_looks(self) -> bool:
        """Where there is one, and a block before the last."""
        return self.class_token and self.depth > 1

    @property
    def side(self) -> int:
        """Patches along the side of a picture."""
        return self.image_size // self.patch_size

    @property
    def places(self) -> int:
        """Patches of a picture, the class token among them."""
        return self.side**2 + self.class_token

    @property
    def seen(self) -> Box:
        """The part of a square picture that its patches cover."""
        covered = self.side * self.patch_size / self.image_size
        return 0.0, 0.0, covered, covered


def parse_vit(hf: HfConfig, where: str) -> dict[str, Any]:
    """Fields of a `VitConfig` that the config of the transformer itself states.

    Args:
        hf: the `vision_config` of an HF config.
        where: names it in messages.

    Raises:
        ConfigError: a key is missing or asks for what is not computed.
    """
    only(hf, "model_type", tuple(KINDS), where)
    if hf.get("model_type") is None:
        raise ConfigError(f"{where}: 'model_type' is missing, expected {' or '.join(map(repr, KINDS))}")
    kind = KINDS[hf["model_type"]]
    if kind == "siglip" and hf.get("vision_use_head", True) is not False:
        raise ConfigError(
            f"{where}: 'vision_use_head' is {hf.get('vision_use_head', True)!r}, expected False: the pooling head of "
            "SigLIP is not computed"
        )
    act = hf.get("hidden_act", ACTIVATIONS[kind])
    only({"hidden_act": act}, "hidden_act", ("quick_gelu", "gelu_pytorch_tanh", "gelu"), where)
    sizes = {field: integer(hf, key, most, where=where) for field, (key, most) in SIZES.items()}
    return {
        **sizes,
        "kind": kind,
        "in_channels": integer(hf, "num_channels", MAX_SIDE, default=3, where=where),
        "activation": act,
        "layer_norm_eps": number(hf, "layer_norm_eps", EPSILON[kind], 0, 1, where),
    }


def feature_layers(stated: Any, depth: int, key: str = "vision_feature_layer") -> tuple[int, ...]:
    """`vision_feature_layer`, a number or a list of them, as numbers from 0 to `depth`. Negative ones count from the
    end, -1 being the last block.

    Raises:
        ConfigError: it is something else, or there is no such block.
    """
    layers = stated if isinstance(stated, list) else [stated]
    if not layers or not all(type(n) is int and -depth - 1 <= n <= depth for n in layers):
        raise ConfigError(
            f"config.json: {key!r} is {stated!r}, expected an integer from {-depth - 1} to {depth}, or a list of them"
        )
    return tuple(n % (depth + 1) for n in layers)


def render_feature_layers(vit: VitConfig) -> int | list[int]:
    """`vision_feature_layer` of an HF config."""
    layers = [n - vit.depth - 1 for n in vit.feature_layers]
    return layers[0] if len(layers) == 1 else layers


def render_vit(vit: VitConfig) -> dict[str, Any]:
    """The `vision_config` that `parse_vit` reads."""
    head = {"vision_use_head": False} if vit.kind == "siglip" else {}
    return {
        "model_type": next(name for name, kind in KINDS.items() if kind == vit.kind),
        **{key: getattr(vit, field) for field, (key, _) in SIZES.items()},
        "num_channels": vit.in_channels,
        "hidden_act": vit.activation,
        "layer_norm_eps": vit.layer_norm_eps,
        **head,
    }


def vit_tensors(vit: VitConfig, prefix: str) -> list[TensorRule]:
    """Every tensor of the transformer, blocks behind the last one that is computed too.

    Args:
        vit: its sizes.
        prefix: of the keys.
    """
    D, F, p = vit.hidden_size, vit.mlp_size, vit.patch_size
    inside = f"{prefix}embeddings."
    rules = [
        _alone(f"{inside}patch_embedding.weight", "patch.weight", (D, vit.in_channels, p, p)),
        _alone(f"{inside}position_embedding.weight", "position", (vit.places, D)),
    ]
    if vit.class_token:
        rules.append(_alone(f"{inside}class_embedding", "class_token", (D,)))
        rules += layer_norm(f"{prefix}pre_layrnorm", "vision.pre_norm", D)
    else:
        rules.append(_alone(f"{inside}patch_embedding.bias", "patch.bias", (D,)))
    for n in range(vit.depth):
        block = f"{prefix}encoder.layers.{n}."
        rules += layer_norm(f"{block}layer_norm1", "attention_norm", D, n)
        rules += layer_norm(f"{block}layer_norm2", "mlp_norm", D, n)
        for key, path in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output")):
            rules += linear(f"{block}self_attn.{key}_proj", f"attention.{path}", D, D, n)
        rules += linear(f"{block}mlp.fc1", "mlp.first", F, D, n)
        rules += linear(f"{block}mlp.fc2", "mlp.second", D, F, n)
    return rules + layer_norm(f"{prefix}post_layernorm", "vision.post_norm", D)


def projector_tensors(vit: VitConfig, prefix: str) -> list[TensorRule]:
    """Every tensor of the projector under the keys `linear_1` and `linear_2`."""
    into, out = vit.hidden_size * len(vit.feature_layers), vit.out_size
    rules = linear(f"{prefix}linear_1", "vision.projector.first", out, into)
    rules += linear(f"{prefix}linear_2", "vision.projector.second", out, out)
    return [rule for rule in rules if vit.projector_bias or not rule.path.endswith(".bias")]


def _alone(key: str, path: str, shape: tuple[int, ...]) -> TensorRule:
    return TensorRule(key, f"vision.{path}", None, None, shape)


def cut_pictures(pictures: Sequence[UInt8[NpArray, "H W 3"]], vit: VitConfig) -> Patches:
    """Patches of pictures of `image_size`, row by row, each picture a frame; in front of each, where there is one, its
    class token: a patch of zeros whose place is (-1, -1)."""
    p, side, count = vit.patch_size, vit.side, len(pictures)
    pixels: Any = np.zeros((count, vit.places, vit.patch_width), np.uint8)
    for n, picture in enumerate(pictures):
        blocks = picture[: side * p, : side * p].reshape(side, p, side, p, vit.in_channels)
        pixels[n, vit.places - side**2 :] = blocks.transpose(0, 2, 4, 1, 3).reshape(side**2, -1)
    frame, place = _codes(count, side, vit.class_token)
    return Patches(pixels.reshape(-1, vit.patch_width), frame, place, frame)


@functools.lru_cache(maxsize=256)
def _codes(count: int, side: int, class_token: bool) -> tuple[Any, Any]:
    """Frame and place of each patch."""
    one: Any = np.indices((side, side), dtype=np.int32).reshape(2, -1).T
    one = np.concatenate([np.full((int(class_token), 2), -1, np.int32), one])
    frame = np.repeat(np.arange(1, count + 1, dtype=np.int32), len(one))
    place = np.tile(one, (count, 1))
    for array in (frame, place):
        array.setflags(write=False)
    return frame, place
