"""Context tokens in the mask: each sees its own picture or frame alone, and all that follows sees it.

Source: Gaze Attention (arXiv 2605.13080), as its authors describe it: context tokens "attend only to" their image or
frame and stay visible to every query. With f the tokens of the frame (or the whole picture) of a context token, which
is the row-th behind them,

    lo = own order - row - f                                        its frame and the context tokens before it
    open_q = the document on context tokens, open_k = the document on its first token        with sees = "own+first"

so that a token before it is seen if and only if it is of its frame. Our reading: it also sees the context tokens that
stand before it behind the same frame, and itself. Nobody else sees other things than before: for text and visual
tokens a context token is one more token of the document.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import LayeredConfig, Layers
from rave_jax.attention.masks import NO_OPEN_K, NO_OPEN_Q
from rave_jax.attention.zero_tuning import first
from rave_jax.batch import Kind, TokenInfo
from rave_jax.kernels.attention import MaskCodes
from rave_jax.layout import ContextTokens
from rave_jax.typing import Array, Bool, Int


@dataclass(frozen=True)
class ContextSight(LayeredConfig):
    """What context tokens see. A model has it in all layers where its options ask for context tokens, so no config
    names it among the mechanisms."""

    tokens: ContextTokens
    """The model's context tokens."""
    layers: Layers = "all"
    """Always all: a context token that saw text in one layer would carry it into the others."""

    @property
    def called(self) -> str:
        """Errors name the option, which is what stands in a config."""
        return f"ContextTokens(sees={self.tokens.sees!r})"

    @property
    def apart(self) -> str:
        """They are in all layers."""
        return "set sees='own' of ContextTokens"

    def build(self, dims: AttentionDims, key: jax.Array) -> ContextMask:
        """The mechanism of one layer."""
        return ContextMask(self.tokens) if self.tokens.sees == "own" else ContextMaskAndFirst(self.tokens)


class ContextMask(Mechanism):
    """Closes what stands before its frame to a context token. Without parameters.

    It counts in `order` from the token itself, so no other mechanism may change `order` or `hi` of context tokens.
    """

    def __init__(self, tokens: ContextTokens):
        self.context = tokens

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """lo = first token of the frame or picture, on context tokens."""
        own = codes.hi - info_q.row - self._size(info_q)
        return codes._replace(lo=jnp.where(_context(info_q), jnp.maximum(codes.lo, own), codes.lo))

    def _size(self, info: TokenInfo) -> Int[Array, "B T"]:
        """Visual tokens that a context token belongs to."""
        frames = 1 if self.context.per == "frame" else info.grid_t
        return frames * info.grid_h * info.grid_w


class ContextMaskAndFirst(ContextMask):
    """Also opens the first token of the document to it."""

    OWNS = ("opening",)

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """The opening is the document's number, on context queries and on first tokens."""
        codes = super().mask(info_q, info_k, codes)
        return codes._replace(
            open_q=jnp.where(_context(info_q), info_q.document, NO_OPEN_Q),
            open_k=jnp.where(first(info_k), info_k.document, NO_OPEN_K),
        )


def _context(info: TokenInfo) -> Bool[Array, "B T"]:
    return info.kind == Kind.CONTEXT
