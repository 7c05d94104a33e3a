"""How the queries of one layer choose under `Gaze`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims, Features
from rave_jax.attention.gaze import descriptors
from rave_jax.attention.gaze.descriptors import Summary
from rave_jax.attention.gaze.places import bounds, start_of_document
from rave_jax.attention.gaze.regions import RegionRouter
from rave_jax.batch import Kind, TokenInfo
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.attention.base import NOWHERE
from rave_jax.kernels.routed import Routing
from rave_jax.typing import Array, Bool, Float, Int

if TYPE_CHECKING:
    from rave_jax.attention.gaze.config import Gaze


class GazeRouter(RegionRouter):
    """Routes the queries of one layer. Parameters: pooling [K,h] of a learned descriptor, zero (the mean) at the start;
    a hard choice gives it no gradient."""

    def __init__(self, config: Gaze, dims: AttentionDims):
        super().__init__(config.rule, config.regions)
        self.config = config
        # Regions are ranked by the query that meets their keys, which another mechanism may make the one before RoPE.
        self.NEEDS = () if config.descriptor_keys == "pre_rope" else ("query",)
        self.WANTS = ("terms",) if config.rank_with_bias else ()
        if config.descriptor == "learned":
            pooling = jnp.zeros((dims.num_kv_heads, dims.head_dim))
            self.pooling = nnx.Param(pooling, axes=("kv_heads", "head_dim"))

    def summarise(self, x: Features, region: Int[Array, "B T"], regions: int) -> Summary:
        """Sums or extremes over the keys of each region."""
        return self.summary_of(x.k if self.config.descriptor_keys == "post_rope" else x.k0, region, regions)

    def summary_of(self, k: Float[Array, "B S K h"], region: Int[Array, "B S"], regions: int) -> Summary:
        """The same of keys that are given."""
        logits = None
        if self.config.descriptor == "learned":
            pooling = self.pooling[...].astype(jnp.float32)
            logits = jnp.einsum("BSKh,Kh->BSK", k.astype(jnp.float32), pooling)
        return descriptors.summarise(self.config.descriptor, k, logits, region, regions)

    def route(
        self,
        x: Features,
        summary: Summary,
        info_q: TokenInfo,
        info_k: TokenInfo,
        codes: MaskCodes,
        regions: int,
        progress: Float[Array, ""] | None,
    ) -> Routing:
        """What each query chooses from, and how."""
        config = self.config
        q = x.q if config.descriptor_keys == "post_rope" else x.q0
        B, _, _, h = q.shape
        place, _ = bounds(info_k.offset, info_k.region, regions)
        descriptor = descriptors.describe(config.descriptor, summary, (B, regions, x.k.shape[2], h), place)
        if config.normalise == "keys":
            descriptor = descriptors.evened(descriptor, summary, _begins(info_k, place), config.regions.tokens)
        query = descriptors.features(config.descriptor, q, info_q.offset)
        before = self._before(info_q, info_k, codes, place)
        dense = None if progress is None else config.schedule.dense(progress)
        return self.routing(query, descriptor, before, info_k, codes, dense)

    def _before(
        self, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes, place: Int[Array, "B R"]
    ) -> Int[Array, "B T"]:
        """Text chooses from all that it sees whole; visual tokens, if at all, from what stands before the frames of
        their own region; padding and context tokens do not choose."""
        before = jnp.where(info_q.kind == Kind.TEXT, codes.hi + 1, NOWHERE)
        if self.config.visual_queries == "dense":
            return before
        frames = place - _corner(info_k, place.shape[1])
        frames = jnp.take_along_axis(frames, jnp.maximum(info_q.region - 1, 0), axis=1)
        return jnp.where(info_q.kind == Kind.VISUAL, start_of_document(info_q, info_k, codes) + frames, before)


def _corner(info: TokenInfo, R: int) -> Int[Array, "B R"]:
    """How many tokens of its first frame stand before a region: known as soon as one of its tokens is, whatever the
    chunk."""
    return bounds(info.row * info.grid_w + info.col, info.region, R)[0]


def _begins(info: TokenInfo, place: Int[Array, "B R"]) -> Bool[Array, "B R"]:
    """Is a region, whose first token stands at `place`, the first of its frames?"""
    R = place.shape[1]
    document, _ = bounds(info.document, info.region, R)
    start = place - _corner(info, R)
    other = (start[:, 1:] != start[:, :-1]) | (document[:, 1:] != document[:, :-1])
    return jnp.pad(other, ((0, 0), (1, 0)), constant_values=True)
