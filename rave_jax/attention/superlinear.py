"""Superlinear attention's spans: a query searches spans of earlier tokens and merges them by its search scores.

Source: Superlinear multi-step attention, arXiv 2601.18401, known to us from a summary, its README and a public copy of
its code. There, keys of a linear recurrence (Mamba-2) stand at anchors n^2 - 1 tokens back, n = 1, 2, ..., behind a
window; a query of its own projection scores the anchors and takes the best few; plain causal attention runs over a span
of tokens before each and the window beside it, and the spans' outputs are merged by the softmax over the search scores,
which so get a gradient.

Here is what fits a layer of a decoder that has no recurrence. With blocks I_n of b tokens as spans:

    s_in  = <q_i W_q, mean of k W_k over I_n> / sqrt(r)     over the blocks that end before its own, and 0 for that
    out_i = sum_n softmax_n(s_i) attention_i(I_n)           over its own, up to the query, and the best `spans` others

attention_i(I) is plain attention to the keys of I alone. So the spans do not overlap, anchors lie in equal strides, the
window is the own block, a span of its own with a search score of 0, and a learned projection of the keys stands for the
recurrence.
With b about the root of a row's length both steps cost its power 1.5. All of it has a gradient but the choice of spans.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from rave_jax.attention.base import AttentionDims
from rave_jax.attention.blocks import MAX_BLOCK, MAX_RANK, ProjectedRouter
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.config import check_fields, require
from rave_jax.kernels.routed import RouteRule


@dataclass(frozen=True)
class Superlinear(MechanismConfig):
    """A query searches spans of earlier tokens and merges what it reads in each by its search scores."""

    block: int = 256
    """Tokens of a span, text and visual tokens alike, counted from the start of the document. A document of no more is
    read as without the mechanism."""
    spans: int = 3
    """Spans that a query reads beside its own."""
    rank: int = 32
    """Channels of the search, r."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.block <= MAX_BLOCK, "block", self.block, f"a number of tokens from 1 to {MAX_BLOCK:,}")
        require(1 <= self.spans < 2**31, "spans", self.spans, "a number of spans from 1 to 2147483647")
        require(1 <= self.rank <= MAX_RANK, "rank", self.rank, f"a number from 1 to {MAX_RANK:,}")

    @property
    def against_kernels(self) -> str:
        """The kernels give one softmax."""
        return "its spans have a softmax each, and the kernels give one for all keys"

    @property
    def needs_all(self) -> bool:
        """Blocks are of all tokens of a document."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> Search:
        """The mechanism of one layer."""
        return Search(self, dims, key)


class Search(ProjectedRouter):
    """Ranks and weighs spans."""

    SHUTS = ("key_groups", "factor")

    def __init__(self, config: Superlinear, dims: AttentionDims, key: jax.Array):
        super().__init__(config.block, RouteRule(config.spans, choice="spans"), "all", config.rank, dims, key)

    @property
    def whole(self) -> int:
        """Documents of one span: others have more than one softmax, however many of them are read."""
        return self.size
