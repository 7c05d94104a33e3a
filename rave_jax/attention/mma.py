"""Modality-mutual attention (MMA): visual tokens also see the question that follows them.

Source: AKI, arXiv 2503.02597, its mask rule for one image and one turn and its released code:

    allow(i, j) = (j <= i)  or  (i visual and j question)

Images stay causal among themselves, and answers are never opened: an image that read one would hand it to earlier
answer tokens a layer later.

Our reading, for several images and turns: a visual token sees the question text of its own turn. The released code also
opens the answer's header up to its `<|assistant|>` token; here a header belongs to the answer and stays closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.masks import NO_OPEN_K, NO_OPEN_Q
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import check_fields
from rave_jax.kernels.attention import MaskCodes
from rave_jax.typing import Array, Int


@dataclass(frozen=True)
class Mma(MechanismConfig):
    """Visual tokens see the question of their turn, also where it comes later."""

    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def looks_ahead(self) -> bool:
        """Visual tokens see the question behind them."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> MmaMask:
        """The mechanism of one layer."""
        return MmaMask()


class MmaMask(Mechanism):
    """Opens the question of each turn to the visual tokens of the turn."""

    OWNS = ("opening",)

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """open_q = the turn on visual queries, open_k = the turn on question text."""
        turns = jnp.max(info_k.turn) + 1

        def turn(info: TokenInfo) -> Int[Array, "B N"]:
            """A number of its own for each turn of each document."""
            return info.document * turns + info.turn

        question = (info_k.kind == Kind.TEXT) & (info_k.role == Role.QUESTION)
        return codes._replace(
            open_q=jnp.where(info_q.kind == Kind.VISUAL, turn(info_q), NO_OPEN_Q),
            open_k=jnp.where(question, turn(info_k), NO_OPEN_K),
        )
