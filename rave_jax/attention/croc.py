"""Croc's mixed attention: both ways within a picture, or within all that comes before the answer.

Source: Croc, arXiv 2410.14332, which uses it in one stage of pretraining. Two rules, because its words and its released
code differ:

    visual (the paper's words)   allow(i, j) = (j <= i)  or  (i and j visual and of one image)
    prefix (the released code)   allow(i, j) = (j <= i)  or  (j before the first supervised token)

Our reading: "of one image" for several images and for videos; the first supervised token is the first token of the
document's first answer, whose header counts as answer, so that training and generation agree. A document without an
answer is all prefix: do not train on one. Context tokens are of the image that they stand behind, and of the prefix:
other tokens see them both ways, and they see what the model lets them see (`attention.context`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.masks import by_order, document_starts
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import check_fields
from rave_jax.kernels.attention import MaskCodes
from rave_jax.typing import Array, Int


@dataclass(frozen=True)
class Croc(MechanismConfig):
    """Tokens of a picture, or of all that comes before the answer, see each other both ways."""

    rule: Literal["visual", "prefix"] = "visual"
    """visual: tokens of one picture see each other; prefix: all tokens before the document's first answer do."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def looks_ahead(self) -> bool:
        """A token sees the rest of its picture, or of the prompt."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> CrocMask:
        """The mechanism of one layer."""
        return CrocMask(self)


class CrocMask(Mechanism):
    """Raises `hi` to the end of the query's block."""

    OWNS = ("hi",)

    def __init__(self, config: Croc):
        self.config = config

    def mask(self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
        """hi = last token of the query's block, where it stands in one and is no context token."""
        if self.config.rule == "visual":
            block = by_order(info_k.image, codes.order)
        else:
            block = _prefix(*(by_order(code, codes.order) for code in (info_k.document, info_k.role)))
        ends = jnp.where(block > 0, _last_of_run(block), 0)
        raised = jnp.maximum(codes.hi, jnp.take_along_axis(ends, codes.hi, axis=1, mode="clip"))
        return codes._replace(hi=jnp.where(info_q.kind == Kind.CONTEXT, codes.hi, raised))


def _prefix(document: Int[Array, "B S"], role: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The document's number on tokens before its first answer, else 0."""
    index = jnp.arange(document.shape[1], dtype=jnp.int32)
    answered = jax.lax.cummax(jnp.where(role == Role.RESPONSE, index, -1), axis=1) >= document_starts(document)
    return jnp.where(answered, 0, document)


def _last_of_run(block: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Index of the last token of each token's run of equal numbers."""
    index = jnp.arange(block.shape[1], dtype=jnp.int32)
    last = jnp.pad(block[:, 1:] != block[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return jax.lax.cummin(jnp.where(last, index, block.shape[1]), axis=1, reverse=True)
