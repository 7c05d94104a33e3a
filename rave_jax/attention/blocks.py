"""Routing over blocks of a document's tokens, text and pictures alike: what mechanisms share whose regions are places.

With b tokens in a block, the token at place p of its document is in block p // b. A query chooses among the blocks
that end before its own begins, by <x, d> of a query feature and the mean d of a key feature over the block; its own
block it always reads, as far as the mask lets it. A block of one document is never one of another.

A document of so few blocks that all of them are chosen is read whole and gets no numbers. So a row of S tokens has at
most S / b blocks and one more for each long document, whatever is packed into it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims, Features, Keys, Mechanism
from rave_jax.attention.gaze import descriptors
from rave_jax.attention.gaze.places import bounds, start_of_document
from rave_jax.batch import Kind, TokenInfo
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.attention.base import NOWHERE
from rave_jax.kernels.routed import RouteRule, Routes, Routing
from rave_jax.typing import Array, Float, Int

MAX_BLOCK = 1 << 20
"""Most tokens of a block: more than any row holds."""
MAX_RANK = 1 << 12
"""Most channels of learned projections."""


class Blocks(NamedTuple):
    """Numbers of blocks in rows, counted from 1; 0 in documents that are read whole. There are at most `count`."""

    of: Int[Array, "B S"]
    count: int


class Pooled(NamedTuple):
    """Blocks, and the mean of a key feature over each."""

    blocks: Blocks
    mean: Float[Array, "B R K c"]


def blocks_of(info: TokenInfo, size: int, whole: int) -> Blocks | None:
    """The blocks of `size` tokens in rows; None where no document can have more than `whole` tokens.

    Documents are numbered rising in a row, and those of up to `whole` tokens are read whole.
    """
    S = info.document.shape[1]
    longest = S // (whole + 1)
    if longest == 0:
        return None
    real = info.document > 0
    tokens = jax.vmap(lambda x, at: jax.ops.segment_max(x, at, num_segments=S + 1))
    length = tokens(jnp.where(real, info.offset + 1, 0), info.document)
    found = jnp.where(length > whole, -(-length // size), 0)
    before = jnp.cumsum(found, axis=1) - found

    def of_tokens(x: Int[Array, "B n"]) -> Int[Array, "B S"]:
        return jnp.take_along_axis(x, info.document, axis=1, mode="clip")

    long = real & (of_tokens(length) > whole)
    number = of_tokens(before) + info.offset // size + 1
    return Blocks(jnp.where(long, number, 0), (S + longest * (size - 1)) // size)


def read_whole(rule: RouteRule, size: int) -> int:
    """The most tokens of a document whose queries choose every block that they may."""
    n = 0
    while n < MAX_BLOCK and rule.most(n + 1) == n + 1:
        n += 1
    return (n + 1) * size


class BlockRouter(Mechanism):
    """Routes the queries of one layer over blocks."""

    OWNS = ("route",)
    OWN_REGIONS: ClassVar[bool] = True
    NEEDS = ("order", "query")

    def __init__(self, size: int, rule: RouteRule | None, queries: Literal["all", "text"]):
        self.size, self.rule, self.queries = size, rule, queries

    @abstractmethod
    def routing_keys(self, keys: Keys, own: int) -> Float[Array, "B S K c"]:
        """What is averaged over a block; what this mechanism remembers is `keys.remembered[own]`."""
        ...

    @abstractmethod
    def routing_queries(self, x: Features) -> Float[Array, "B T H c"]:
        """What meets the averages."""
        ...

    def pool(self, keys: Keys, own: int, info_k: TokenInfo) -> Pooled | None:
        """Means over blocks; None where every block is read."""
        blocks = self.blocks(info_k)
        if blocks is None:
            return None
        k = self.routing_keys(keys, own)
        (B, _, K, c), R = k.shape, blocks.count
        summary = descriptors.summarise("mean", k, None, blocks.of, R)
        return Pooled(blocks, descriptors.describe("mean", summary, (B, R, K, c), jnp.zeros((B, R), jnp.int32)))

    def blocks(self, info: TokenInfo) -> Blocks | None:
        """The blocks of rows, or None where every block is read."""
        return None if self.rule is None else blocks_of(info, self.size, self.whole)

    @property
    def whole(self) -> int:
        """The most tokens of a document that is read whole."""
        return self.size if self.rule is None else read_whole(self.rule, self.size)

    def route(
        self,
        x: Features,
        summary: Pooled | None,
        info_q: TokenInfo,
        info_k: TokenInfo,
        codes: MaskCodes,
        regions: int,
        progress: Float[Array, ""] | None,
    ) -> Routing | None:
        """Every query, or those of text, chooses from the blocks that end before its own begins."""
        if summary is None or self.rule is None:
            return None
        (of, count), mean = summary
        first, last = bounds(codes.order, of, count)
        own = start_of_document(info_q, info_k, codes) + info_q.offset // self.size * self.size
        routed = info_q.kind == Kind.TEXT if self.queries == "text" else info_q.kind != Kind.CONTEXT
        routed = routed & (info_q.document > 0)
        before = jnp.where(routed, own, NOWHERE)
        query = self.routing_queries(x).astype(jnp.float32)
        return Routing(Routes(query, mean, first, last, before, of, None), self.rule, self.size)


class ProjectedRouter(BlockRouter):
    """Ranks blocks by learned projections of queries and keys after RoPE, of r channels. Parameters: query [H,h,r] and
    key [K,h,r]; at the start one random matrix, so that the product of both is <q, k> on the average."""

    def __init__(
        self,
        size: int,
        rule: RouteRule | None,
        queries: Literal["all", "text"],
        rank: int,
        dims: AttentionDims,
        key: jax.Array,
    ):
        super().__init__(size, rule, queries)
        H, K, h, _ = dims
        sketch = jax.random.normal(key, (K, h, rank)) * rank**-0.5
        self.key = nnx.Param(sketch, axes=("kv_heads", "head_dim", None))
        self.query = nnx.Param(jnp.repeat(sketch, H // K, axis=0), axes=("heads", "head_dim", None))

    def remember(self, x: Features) -> Float[Array, "B T K r"]:
        """Projected keys."""
        return jnp.einsum("BSKh,Khr->BSKr", x.k.astype(jnp.float32), self.key[...].astype(jnp.float32))

    def routing_keys(self, keys: Keys, own: int) -> Float[Array, "B S K r"]:
        """Projected keys."""
        return keys.remembered[own]

    def routing_queries(self, x: Features) -> Float[Array, "B T H r"]:
        """Projected queries, scaled."""
        W = self.query[...].astype(jnp.float32)
        return jnp.einsum("BTHh,Hhr->BTHr", x.q.astype(jnp.float32), W) * W.shape[-1] ** -0.5
