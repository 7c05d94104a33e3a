"""Gaze Attention as a mechanism: each query reads the regions of earlier pictures that it ranks highest.

Stated by the authors (arXiv 2605.13080): cached keys of visual tokens are laid out in space and time in regions of
6 x 6 x 1 by default; a region's descriptor is the mean of its keys; a query attends to the TopK regions by <q, d>,
jointly over all images or frames, and to context tokens; next-token loss only, starting dense with ever fewer regions.
One choice for each query head and layer is read from their published demo. Ours: the shape of the schedule; that all
text queries behind a picture are routed, in prompt and answer; that visual queries are not, by default; descriptors of
keys after RoPE, in float32; the other descriptors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims, Features
from rave_jax.attention.cost import LayerReading, PicturesBefore
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.gaze import descriptors
from rave_jax.attention.gaze.cost import reading
from rave_jax.attention.gaze.descriptors import DescriptorName, Summary
from rave_jax.attention.gaze.places import bounds, start_of_document
from rave_jax.attention.gaze.regions import RegionRouter
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.attention.base import NOWHERE
from rave_jax.kernels.routed import RouteRule, Routing
from rave_jax.layout import FixedRegions, Regions, VisualLayout
from rave_jax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class TopKSchedule:
    """How training comes from all regions to `top_k`."""

    shape: Literal["cosine", "linear", "steps", "none"] = "cosine"
    """How the share of further regions falls from 1 to 0: along half a cosine, a line, or by halves in four equal
    steps; none starts with `top_k`."""
    until: float = 0.5
    """Share of the run's steps after which it is 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 < self.until <= 1, "until", self.until, "a share of the run, above 0 and at most 1")

    def dense(self, progress: Float[Array, ""]) -> Float[Array, ""]:
        """The share at `progress`, 0 to 1 of the run."""
        x = jnp.clip(progress / self.until, 0.0, 1.0)
        if self.shape == "none":
            return jnp.zeros_like(x)
        if self.shape == "linear":
            return 1.0 - x
        if self.shape == "steps":
            return jnp.where(x < 1, 0.5 ** jnp.floor(4 * x), 0.0)
        # Exactly 0 at the end: the least share above it is one region more than `top_k`.
        return jnp.where(x < 1, 0.5 * (1.0 + jnp.cos(math.pi * x)), 0.0)


MAX_REGIONS = 1 << 16
"""Most regions of a row: each query meets every one."""


@dataclass(frozen=True)
class Gaze(MechanismConfig):
    """Each query reads the regions of earlier pictures that it ranks highest, and all text (Gaze Attention)."""

    regions: Regions = field(default_factory=FixedRegions)
    """How visual tokens are grouped."""
    max_regions: int = 256
    """Most regions of a row; samples and prompts with more are over budget."""
    top_k: int | float = 0.25
    """Regions a query reads of all pictures before it: a whole number (1 is one region), or below 1 a fraction. 1.0 is
    refused; as many as `max_regions` is all."""
    schedule: TopKSchedule = field(default_factory=TopKSchedule)
    """From all regions to `top_k` in training; outside training it has ended."""
    descriptor: DescriptorName = "mean"
    """What of a region's keys a query meets: their mean; least and greatest channels (min_max); mean and variance
    (spread); a learned pooling, which learns under a soft choice alone; for study noise, by the places of query and
    region (random), or the true attention mass (oracle)."""
    descriptor_keys: Literal["post_rope", "pre_rope"] = "post_rope"
    """Keys (and queries) that rank regions: as the cache holds them, or before rotary positions, as Decomposed in the
    same layer asks for."""
    normalise: Literal["none", "keys"] = "none"
    """keys: a region with fewer keys than a whole one, at the edge of a picture, is ranked as if its mean varied no
    more than that of a whole region; with none, chance alone gives such regions more places. Needs descriptor mean."""
    rank_with_bias: bool = False
    """Are regions ranked with the bias that RAVE gives their mean gate key, beside the descriptor? Needs RAVE in the
    same layers."""
    share: Literal["head", "group"] = "head"
    """Who has a choice of its own: each query head, or each kv head with the query heads that read it."""
    choice: Literal["hard", "soft_bias", "straight_through"] = "hard"
    """Hard choices have no gradient; soft_bias adds tau * log softmax of the regions' scores to their keys;
    straight_through does so in the backward pass alone."""
    tau: float = 1.0
    """Scale of the soft choices."""
    visual_queries: Literal["dense", "frame+routed"] = "dense"
    """What visual tokens see of earlier pictures and frames: all, or their own choice (for long videos)."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        known = 1 <= self.max_regions <= MAX_REGIONS
        require(known, "max_regions", self.max_regions, f"a number from 1 to {MAX_REGIONS:,}")
        known = not (self.rank_with_bias and self.descriptor == "oracle")
        require(known, "rank_with_bias", True, "False with descriptor 'oracle', whose masses have the bias")
        known = self.normalise == "none" or self.descriptor == "mean"
        require(known, "normalise", self.normalise, f"'none' with descriptor {self.descriptor!r}: only means have it")
        _ = self.rule  # refuses a wrong top_k or tau

    @property
    def rule(self) -> RouteRule:
        """The kernels' part of it."""
        by = "mass" if self.descriptor == "oracle" else "descriptor"
        return RouteRule(self.top_k, self.share, self.choice, self.tau, self.rank_with_bias, by)

    @property
    def layout(self) -> VisualLayout:
        """Visual tokens lie region by region."""
        return VisualLayout(self.regions, self.max_regions)

    @property
    def against_kernels(self) -> str | None:
        """The kernels serve hard choices by descriptors."""
        wrong = [("choice", self.choice != "hard"), ("descriptor", self.descriptor == "oracle")]
        found = [f"{name} {getattr(self, name)!r}" for name, is_wrong in wrong if is_wrong]
        served = "the kernels serve choice 'hard' with any descriptor but 'oracle'"
        return f"it has {' and '.join(found)}, and {served}" if found else None

    def reading(self, pictures: PicturesBefore, dims: AttentionDims, number_bytes: int) -> LayerReading:
        """Each query reads the regions that it chooses, and meets a descriptor of each."""
        return reading(self, pictures, dims, number_bytes)

    @property
    def skips_keys(self) -> bool:
        """A decoding step reads the chosen regions alone, but for masses and soft biases, which are of all keys."""
        return self.descriptor != "oracle" and self.choice != "soft_bias"

    def build(self, dims: AttentionDims, key: jax.Array) -> GazeRouter:
        """The mechanism of one layer."""
        return GazeRouter(self, dims)


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
        k = x.k if self.config.descriptor_keys == "post_rope" else x.k0
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
