"""Concentric causal attention (CCA): a picture is read from its outer ring inwards.

Source: CCA, arXiv 2410.15926, and its released code, for one square image. With t0 the image's first place and
ring = min(row, H - 1 - row, col, W - 1 - col):

    allow(i, j) = ring_j <= ring_i   where i and j are of one image, else   j <= i
    position    = t0 + ring          on the image; text after it goes on at t0 + H / 2

Our reading: the same ring where H and W differ, with text going on at t0 + ceil(min(H, W) / 2); each image of several,
and each frame of a video, is one picture; all three axes of M-RoPE take the position. Context tokens take one position
each, like text, and are in no ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.masks import by_order
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields
from rave_jax.kernels.attention import MaskCodes
from rave_jax.typing import Array, Int


@dataclass(frozen=True)
class Cca(MechanismConfig):
    """Visual tokens stand and see by rings, from the outer one to the centre."""

    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def looks_ahead(self) -> bool:
        """A token sees the rings around it, whose rows go on below."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> CcaRings:
        """The mechanism of one layer."""
        return CcaRings()


class CcaRings(Mechanism):
    """Moves the tokens of a picture to their rings, in the mask's order and in rotary positions."""

    OWNS = ("positions", "order", "hi")

    def positions(
        self, info_q: TokenInfo, info_k: TokenInfo, own: Int[Array, "B T"], positions: Int[Array, "3 B T"]
    ) -> Int[Array, "3 B T"]:
        """Text takes one position each, a picture as many as it has rings; three times the same."""
        place = _places(info_k)
        info = jax.tree.map(lambda code: by_order(code, place), info_k)
        visual = info.kind == Kind.VISUAL
        rings = jnp.where(visual, (jnp.minimum(info.grid_h, info.grid_w) + 1) // 2, 1)
        before = jnp.cumsum(jnp.where(visual & (_raster(info) > 0), 0, rings), axis=1) - rings
        first = jax.lax.cummax(jnp.where(info.offset == 0, before, 0), axis=1)
        asked = jnp.take_along_axis(place, own, axis=1, mode="clip")
        found = jnp.take_along_axis(before - first + _ring(info), asked, axis=1, mode="clip")
        return jnp.broadcast_to(found, positions.shape)

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """order = hi = first token of the picture + ring, on visual tokens."""
        return codes._replace(
            order=codes.order - _raster(info_k) + _ring(info_k), hi=codes.hi - _raster(info_q) + _ring(info_q)
        )


def _places(info: TokenInfo) -> Int[Array, "B S"]:
    """Where each token would lie if those of its document lay side by side in their order, from the first of them on;
    -1 for what is no token. A cache by regions keeps the tokens of a document apart."""
    index = jnp.broadcast_to(jnp.arange(info.document.shape[1], dtype=jnp.int32), info.document.shape)
    most = info.document.shape[1] + 1
    start = jax.vmap(lambda at, number: jax.ops.segment_min(at, number, num_segments=most)[number])
    return jnp.where(info.document > 0, start(index, info.document) + info.offset, -1)


def _raster(info: TokenInfo) -> Int[Array, "B T"]:
    """How many tokens of its picture stand before a visual token; 0 on others."""
    return jnp.where(info.kind == Kind.VISUAL, info.row * info.grid_w + info.col, 0)


def _ring(info: TokenInfo) -> Int[Array, "B T"]:
    """Rings around a visual token; 0 on others."""
    inner = jnp.minimum(
        jnp.minimum(info.row, info.grid_h - 1 - info.row), jnp.minimum(info.col, info.grid_w - 1 - info.col)
    )
    return jnp.where(info.kind == Kind.VISUAL, inner, 0)
