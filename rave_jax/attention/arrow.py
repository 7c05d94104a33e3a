"""Arrow mask: a sliding window, and the first tokens of the document, which stay in sight.

Source: the arrow attention of SeNER, arXiv 2502.07286, a global first token beside a local window; with a causal
decoder and a handful of first tokens it is the mask of StreamingLLM (arXiv 2309.17453), which keeps the tokens that
attention falls back on:

    allow(i, j) = (i - window < j <= i)  or  (j < first <= i)

For long videos: what a token sees does not grow, and the first tokens, which hold much of the attention that goes to
nothing, are never lost. It is a mask alone: the cache keeps all keys. In SeNER the first token also sees all later
ones, which a causal decoder cannot do.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.masks import NO_OPEN_K, NO_OPEN_Q
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import MaskCodes


@dataclass(frozen=True)
class Arrow(MechanismConfig):
    """Each query sees the `window` last tokens of its document and the `first` ones."""

    window: int = 4096
    """Number of keys up to the query that it sees, itself included."""
    first: int = 4
    """Number of tokens at the start of the document that all queries behind them see; at most `window`. Context tokens
    see them in the window alone."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.window < 2**31, "window", self.window, f"a number of tokens from 1 to {2**31 - 1:,}")
        require(1 <= self.first <= self.window, "first", self.first, f"a number of tokens from 1 to {self.window:,}")

    def build(self, dims: AttentionDims, key: jax.Array) -> ArrowMask:
        """The mechanism of one layer."""
        return ArrowMask(self)


class ArrowMask(Mechanism):
    """Closes the causal interval from below, and opens the first tokens. Without parameters."""

    OWNS = ("opening",)
    NEEDS = ("order",)

    def __init__(self, config: Arrow):
        self.config = config

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """lo as of a window; the opening is the number of the document. Queries among the first tokens need none: a
        window is no shorter."""
        first = self.config.first
        behind = (info_q.document > 0) & (info_q.offset >= first) & (info_q.kind != Kind.CONTEXT)
        start = (info_k.document > 0) & (info_k.offset < first)
        return codes._replace(
            lo=jnp.maximum(codes.lo, codes.hi - self.config.window + 1),
            open_q=jnp.where(behind, info_q.document, NO_OPEN_Q),
            open_k=jnp.where(start, info_k.document, NO_OPEN_K),
        )
