"""MoBA: each query reads its own block of the document and the few earlier blocks whose mean keys it meets best.

Source: MoBA, arXiv 2502.13189, and its released code (`moba_attn_varlen_naive`), which agree. With blocks I_n of b
tokens, n(i) the block of query i, and keys after RoPE:

    s_in = <q_i, mean of k over I_n>     for n < n(i),   +inf for n = n(i),   -inf for n > n(i)
    query i reads block n where s_in is among its top_k largest, under the causal mask

So the own block counts as one of `top_k`, and it is read up to the query. There are no parameters, and no gradient
goes through the choice. Every head chooses for itself; `share="group"` is ours, and so is `queries`.

Blocks are of all tokens of a document, those of pictures too. Our reading: context tokens do not choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax

from rave_jax.attention.base import AttentionDims, Features, Keys
from rave_jax.attention.blocks import MAX_BLOCK, BlockRouter
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.config import check_fields, require
from rave_jax.kernels.routed import RouteRule
from rave_jax.typing import Array, Float


@dataclass(frozen=True)
class Moba(MechanismConfig):
    """Each query reads its own block of tokens and the earlier blocks that it ranks highest (MoBA)."""

    block: int = 512
    """Tokens of a block, text and visual tokens alike, counted from the start of the document."""
    top_k: int = 3
    """Blocks that a query reads, its own among them. As many as a document has is all: nothing changes."""
    share: Literal["head", "group"] = "head"
    """Who has a choice of its own: each query head, or each kv head with the query heads that read it."""
    queries: Literal["all", "text"] = "all"
    """Which tokens choose: all, or those of text alone; the others read all that stands before them."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.block <= MAX_BLOCK, "block", self.block, f"a number of tokens from 1 to {MAX_BLOCK:,}")
        what = "a number of blocks from 2 to 2147483647: its own and at least one before it"
        require(2 <= self.top_k < 2**31, "top_k", self.top_k, what)

    @property
    def needs_all(self) -> bool:
        """Blocks are of all tokens of a document."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> MobaRouter:
        """The mechanism of one layer."""
        return MobaRouter(self.block, RouteRule(self.top_k - 1, self.share), self.queries)


class MobaRouter(BlockRouter):
    """Ranks blocks by their mean keys. Without parameters."""

    def routing_keys(self, keys: Keys, own: int) -> Float[Array, "B S K h"]:
        """Keys as the kernel reads them."""
        return keys.k

    def routing_queries(self, x: Features) -> Float[Array, "B T H h"]:
        """Queries as the kernel reads them."""
        return x.q
