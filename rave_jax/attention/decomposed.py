"""Decomposed attention (D-Attn): a visual token sees itself alone, and text looks at the picture without RoPE.

Source: D-Attn, arXiv 2502.01906; known to us from a summary; we have not seen its code. With V visual and T text
tokens, q0 and k0 before RoPE and R the rotation:

    V to V   a visual token sees itself alone, so it gets its own value
    T to V   score = <q0_i, k0_j> / sqrt(h)                so every visual token is equally far away
    T to T   score = <R_i q0_i, R_j k0_j> / sqrt(h)        causal
    out_i    = alpha out_TV + (1 - alpha) out_TT,          alpha = Z_TV / (Z_TV + Z_TT)

and that alpha makes it one softmax over both kinds of key, here one run of the kernel: q~ = [R q0; q0], k~ = [R k0; 0]
on text and [0; k0] on visual keys. Visual tokens are given rotary position 0, where R is the identity, so the cache
holds k0 in the place of R k0, which nobody reads, and not beside it.

Our reading: a visual token sees neither the text before it nor other pictures; text between pictures is text; text
keeps its own positions, whatever the picture before it took. The paper trains with it. Nothing here has parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Mechanism, OtherQuery, Score
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields
from rave_jax.kernels.attention import MaskCodes
from rave_jax.typing import Array, Int


@dataclass(frozen=True)
class Decomposed(MechanismConfig):
    """Visual tokens see only themselves, and text meets them without rotary positions (D-Attn)."""

    rope: Literal["none", "kept"] = "none"
    """Rotary positions between text and visual keys: none is the paper's, and kept leaves its mask alone."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, dims: AttentionDims, key: jax.Array) -> Diagonal:
        """The mechanism of one layer."""
        return Unrotated() if self.rope == "none" else Diagonal()


class Diagonal(Mechanism):
    """Closes all but itself to a visual token. Without parameters."""

    NEEDS = ("order", "hi")

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """lo = hi on visual tokens: hi of a causal query is its own place."""
        return codes._replace(lo=jnp.where(info_q.kind == Kind.VISUAL, codes.hi, codes.lo))


class Unrotated(Diagonal):
    """Also takes the rotation out of what text sees of visual keys. Without parameters.

    It needs the opening plain: through one, a visual query would meet text keys from position 0.
    """

    OWNS = ("positions", "query")
    NEEDS = ("order", "hi", "opening")

    def positions(
        self, info_q: TokenInfo, info_k: TokenInfo, own: Int[Array, "B T"], positions: Int[Array, "3 B T"]
    ) -> Int[Array, "3 B T"]:
        """0 on visual tokens: their q and k stay as they were before RoPE."""
        return jnp.where(info_q.kind == Kind.VISUAL, 0, positions)

    def score(self, x: Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """q before RoPE meets the visual keys."""
        return Score(query=OtherQuery(x.q0, info_k.kind == Kind.VISUAL))
