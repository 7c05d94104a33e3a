"""Sparsifiner: a low-rank prediction of the attention map says which keys a query reads, and learns from the true map.

Source: Sparsifiner, arXiv 2303.13755, a vision transformer; formulas known to us from its text and from a public copy
of code whose origin is not certain. There, with q^ = q W_q and k^ = k W_k of fewer channels and P that mixes the N
tokens of every picture to N / 8,

    C = softmax(scale q^ (k^T P))     approx = C P_back     a query reads the keys with the largest `approx`

and the predictor, which gets no gradient through the choice, learns to reconstruct the true map. P has a fixed N, which
no decoder has. Here its columns are the means over blocks of b tokens, and P_back is the block of a key:

    C_in = softmax_n(<q^_i, mean of k^ over I_n> / sqrt(r))     over the blocks that end before the query's own
    query i reads the ceil(keep n) blocks with the largest C_in, its own block, and no others
    loss = - sum_n m_in log C_in,   m_in = the attention of query i to block n over that to all these blocks

Ours: blocks for P; the own block is always read; cross-entropy of blocks in place of a reconstruction of the map; it is
of every `every`-th query, under the plain causal mask, without what other mechanisms add to scores. Queries, keys and
the true map get no gradient from it. At the start W_q and W_k are one random matrix, so that <q^, k^> is <q, k> on the
average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Keys, Parts
from rave_jax.attention.blocks import MAX_BLOCK, MAX_RANK, ProjectedRouter
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.scores import pick
from rave_jax.attention.statistics import BLOCK
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention.base import group_heads
from rave_jax.kernels.routed import RouteRule
from rave_jax.typing import Array, Bool, Float, Int

LOSS = "sparsifiner"
"""Name of its loss."""


@dataclass(frozen=True)
class Sparsifiner(MechanismConfig):
    """A learned low-rank map chooses the blocks of tokens that a query reads (Sparsifiner)."""

    block: int = 64
    """Tokens of a block, text and visual tokens alike, counted from the start of the document."""
    keep: float = 0.25
    """Share of the blocks before its own that a query reads, rounded up; 1 is all: nothing changes."""
    rank: int = 32
    """Channels of the predicted queries and keys, r."""
    loss: float = 1.0
    """Weight of the predictor's loss."""
    every: int = 16
    """Queries of a document from one whose true map is learned from to the next."""
    share: Literal["head", "group"] = "head"
    """Who has a choice of its own: each query head, or each kv head with the query heads that read it."""
    queries: Literal["all", "text"] = "all"
    """Which tokens choose: all, or those of text alone; the others read all that stands before them."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.block <= MAX_BLOCK, "block", self.block, f"a number of tokens from 1 to {MAX_BLOCK:,}")
        require(0 < self.keep <= 1, "keep", self.keep, "a share above 0 and at most 1")
        require(1 <= self.rank <= MAX_RANK, "rank", self.rank, f"a number from 1 to {MAX_RANK:,}")
        require(0 <= self.loss <= 1e6, "loss", self.loss, "a number from 0 to 1e6")
        require(1 <= self.every <= MAX_BLOCK, "every", self.every, f"a number of tokens from 1 to {MAX_BLOCK:,}")

    @property
    def needs_all(self) -> bool:
        """Blocks are of all tokens of a document."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> Predictor:
        """The mechanism of one layer."""
        return Predictor(self, dims, key)


class Asked(NamedTuple):
    """The queries that the predictor learns from: where they are, whether each is meant, its block, and how many blocks
    of its document stand before that."""

    index: Int[Array, "B N"]
    live: Bool[Array, "B N"]
    own: Int[Array, "B N"]
    earlier: Int[Array, "B N"]


class Predictor(ProjectedRouter):
    """Ranks blocks by the predicted map. Queries and keys get no gradient from it."""

    def __init__(self, config: Sparsifiner, dims: AttentionDims, key: jax.Array):
        rule = RouteRule(config.keep, config.share) if config.keep < 1 else None
        super().__init__(config.block, rule, config.queries, config.rank, dims, key)
        self.config = config

    def remember(self, x: Features) -> Float[Array, "B T K r"]:
        """Predicted keys."""
        return super().remember(x._replace(k=jax.lax.stop_gradient(x.k)))

    def routing_queries(self, x: Features) -> Float[Array, "B T H r"]:
        """Predicted queries, scaled."""
        return super().routing_queries(x._replace(q=jax.lax.stop_gradient(x.q)))

    def losses(self, x: Features, parts: Parts, info_q: TokenInfo, info_k: TokenInfo) -> dict[str, Float[Array, ""]]:
        """Cross-entropy of predicted and true shares of blocks, a mean over heads, summed over the asked queries."""
        pooled = self.pool(Keys(x.k, x.v, (self.remember(x),)), 0, info_k)
        if pooled is None:
            return {LOSS: jnp.zeros((), jnp.float32)}
        (of, R), mean = pooled
        asked, K = self._asked(info_q, of), mean.shape[2]
        number = jnp.arange(1, R + 1)
        first = (asked.own - asked.earlier)[..., None]
        candidate = (first <= number) & (number < asked.own[..., None])
        candidate = jnp.where(asked.live[..., None], candidate, number == 1)[:, None, None]
        query = group_heads(pick(self.routing_queries(x), asked.index), K)
        logits = jnp.einsum("BKGNr,BRKr->BKGNR", query, mean)
        predicted = jax.nn.log_softmax(logits, axis=-1, where=candidate)
        true = self._shares(x, asked, of, candidate)
        found = -jnp.sum(true * jnp.where(candidate, predicted, 0.0), axis=-1)
        return {LOSS: self.config.loss * jnp.sum(jnp.where(asked.live, jnp.mean(found, axis=(1, 2)), 0.0))}

    def loss_weights(self, info: TokenInfo) -> dict[str, Float[Array, ""]]:
        """How many queries the loss is of."""
        blocks = self.blocks(info)
        if blocks is None:
            return {LOSS: jnp.zeros((), jnp.float32)}
        return {LOSS: jnp.sum(self._asked(info, blocks.of).live, dtype=jnp.float32)}

    def _asked(self, info: TokenInfo, of: Int[Array, "B T"]) -> Asked:
        """Every so many queries of a document, if at least two blocks stand before theirs."""
        every, earlier = self.config.every, info.offset // self.size
        meant = (of > 0) & (earlier >= 2) & (info.offset % every == every - 1)
        meant &= info.kind == Kind.TEXT if self.queries == "text" else info.kind != Kind.CONTEXT
        index = jnp.argsort(~meant, axis=1, stable=True)[:, : max(1, of.shape[1] // every)]
        return Asked(index, *(pick(y, index) for y in (meant, of, earlier)))

    def _shares(
        self, x: Features, asked: Asked, of: Int[Array, "B S"], candidate: Bool[Array, "B 1 1 N R"]
    ) -> Float[Array, "B K G N R"]:
        """The attention to each candidate over that to all of them, of the plain scores; some queries at a time, since
        each meets all keys."""
        q, k = (jax.lax.stop_gradient(y).astype(jnp.float32) for y in (pick(x.q, asked.index), x.k))
        member = (of[..., None] == jnp.arange(1, candidate.shape[-1] + 1)).astype(jnp.float32)

        def of_query(each: tuple[Float[Array, "B H h"], Bool[Array, "B R"]]) -> Float[Array, "B K G R"]:
            q, candidate = each
            query = group_heads(q[:, None], k.shape[2])[..., 0, :]
            scores = jnp.einsum("BKGh,BSKh->BKGS", query, k) * q.shape[-1] ** -0.5
            seen = jnp.einsum("BR,BSR->BS", candidate.astype(jnp.float32), member)[:, None, None] > 0
            top = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1, keepdims=True)
            weights = jnp.where(seen, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
            return jnp.einsum("BKGS,BSR->BKGR", weights, member)

        each = jnp.moveaxis(q, 1, 0), jnp.moveaxis(candidate[:, 0, 0], 1, 0)
        mass = jnp.moveaxis(jax.lax.map(of_query, each, batch_size=BLOCK), 0, 3)
        total = jnp.sum(mass, axis=-1, keepdims=True)
        return mass / jnp.where(total > 0, total, 1.0)
