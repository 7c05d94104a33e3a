"""One-dimensional positions: every token counts one, images too (the control for M-RoPE)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.batch import TokenInfo
from rave_jax.config import check_fields
from rave_jax.typing import Array, Int


@dataclass(frozen=True)
class TextPositions(MechanismConfig):
    """Number all tokens of a document 0, 1, 2, ... as a text model does, instead of by M-RoPE."""

    layers: Layers = "all"
    """Decoder layers that use these positions, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, dims: AttentionDims, key: jax.Array) -> Counted:
        """The mechanism of one layer."""
        return Counted()


class Counted(Mechanism):
    """Replaces the three M-RoPE coordinates by the token's place in its document."""

    OWNS = ("positions",)

    def positions(
        self, info_q: TokenInfo, info_k: TokenInfo, own: Int[Array, "B T"], positions: Int[Array, "3 B T"]
    ) -> Int[Array, "3 B T"]:
        """The place of each token, three times."""
        return jnp.broadcast_to(info_q.offset, positions.shape)
