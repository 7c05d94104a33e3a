"""LogN scaling: queries far from the start of their document are multiplied, so that attention stays as sharp.

Source: `use_logn_attn` of the released code of Qwen-7B. For the i-th token of a document, counted from 1, and a model
trained with L tokens, after RoPE and in every head:

    q_i <- q_i log(i) / log(L)    for i > L,    q_i elsewhere

Qwen-7B has L = 2048 and does it outside training alone; here it is done wherever the layer runs. In a packed row each
document counts its own tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Mechanism, Score
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.batch import TokenInfo
from rave_jax.config import check_fields, require


@dataclass(frozen=True)
class LogN(MechanismConfig):
    """Scores of tokens beyond the trained length grow with the log of their place (LogN scaling)."""

    length: int = 2048
    """Tokens of a document that the model was trained with, L. Nothing changes in documents that are not longer."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(2 <= self.length < 2**31, "length", self.length, f"a number of tokens from 2 to {2**31 - 1:,}")

    def build(self, dims: AttentionDims, key: jax.Array) -> ScaledQueries:
        """The mechanism of one layer."""
        return ScaledQueries(self)


class ScaledQueries(Mechanism):
    """The factor of each query. Without parameters."""

    def __init__(self, config: LogN):
        self.config = config

    def score(self, x: Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """log(i) / log(L), or 1."""
        L, place = self.config.length, info_q.offset + 1
        grown = jnp.log(jnp.maximum(place, L).astype(jnp.float32)) / math.log(L)
        return Score(scale=jnp.where(place > L, grown, 1.0))
