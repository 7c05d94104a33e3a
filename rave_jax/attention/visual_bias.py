"""A constant on the scores of visual keys: what a learned bias of queries and keys has to be better than.

    s_ij <- s_ij + bias    where key j is a visual token

so that visual keys weigh exp(bias) times as much before the row is normalised. It is the query's and the key's term of
RAVE with both constant, or PAI's idea (arXiv 2407.21771) without the score's size in it; nothing is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Mechanism, Score
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields, require


@dataclass(frozen=True)
class VisualBias(MechanismConfig):
    """A constant bias on the scores of visual keys; nothing is learned."""

    bias: float = 0.0
    """Added to the scores of visual keys, in logits; visual keys weigh exp(bias) times as much."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(abs(self.bias) <= 1e4, "bias", self.bias, "a number of logits from -10,000 to 10,000")

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if the bias is 0."""
        return BiasedKeys(self.bias, dims.num_heads) if self.bias else Mechanism()


class BiasedKeys(Mechanism):
    """The bias of each key. Without parameters."""

    def __init__(self, bias: float, num_heads: int):
        self.bias, self.num_heads = bias, num_heads

    def score(self, x: Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """The bias on visual keys, 0 on others."""
        bias = jnp.where(info_k.kind == Kind.VISUAL, jnp.float32(self.bias), 0.0)
        return Score(key_bias=jnp.broadcast_to(bias[..., None], (*bias.shape, self.num_heads)))
