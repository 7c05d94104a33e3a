"""BiFormer's bi-level routing: the tokens of a region of a picture read, all alike, the regions that rank highest.

Source: BiFormer, arXiv 2303.08810, and its released code (`bra_legacy.py`), a vision backbone. Of a picture's regions:

    Q_r, K_r = means of queries and keys over region r        A = Q_r K_s^T        I_r = the top_k largest of row r

and the tokens of region r attend to all tokens of the regions I_r; no gradient goes through the choice. The code
divides scores by the root of all heads' channels together; here attention stays the decoder's, the root of head_dim.

In a decoder the mask stays, so a region is a candidate for a query that sees it whole, and what a query sees in part is
left to the mask. Under a causal mask a visual token so chooses among what lies before it. Beside `Croc`, where a
picture is seen both ways, it chooses among all regions of its picture, its own among them, as in the paper. Ours too:
one choice for each query head or kv head, where the paper has one for all heads; a token of text is a region of its
own, as Gaze has it; text is always read. Left out: the depth-wise convolution of the values (LePE), which is no part of
attention weights, soft routing, and the linear of routing parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features
from rave_jax.attention.cost import LayerReading, PicturesBefore
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.gaze import descriptors
from rave_jax.attention.gaze.config import MAX_REGIONS
from rave_jax.attention.gaze.cost import reading
from rave_jax.attention.gaze.descriptors import DescriptorName, Summary
from rave_jax.attention.gaze.regions import RegionRouter
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.attention.base import NOWHERE
from rave_jax.kernels.routed import RouteRule, Routing
from rave_jax.layout import FixedRegions, Regions, VisualLayout
from rave_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class BiFormer(MechanismConfig):
    """The visual tokens of a region read, all alike, the regions that rank highest by mean query and mean key."""

    regions: Regions = field(default_factory=FixedRegions)
    """How visual tokens are grouped."""
    max_regions: int = 256
    """Most regions of a row; samples and prompts with more are over budget."""
    top_k: int | float = 4
    """Regions that are read: a whole number, or below 1 a fraction. As many as `max_regions` is all: no change."""
    text: Literal["routed", "dense"] = "routed"
    """What tokens of text read of pictures: the regions that each chooses by its own query, or all."""
    share: Literal["head", "group"] = "head"
    """Who has a choice of its own: each query head, or each kv head with the query heads that read it."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        known = 1 <= self.max_regions <= MAX_REGIONS
        require(known, "max_regions", self.max_regions, f"a number from 1 to {MAX_REGIONS:,}")
        _ = self.rule  # refuses a wrong top_k

    @property
    def rule(self) -> RouteRule:
        """The kernels' part of it."""
        return RouteRule(self.top_k, self.share)

    @property
    def all_regions(self) -> bool:
        """Is every region chosen?"""
        return self.top_k >= self.max_regions

    @property
    def descriptor(self) -> DescriptorName:
        """What ranks a region: the mean of its keys."""
        return "mean"

    @property
    def layout(self) -> VisualLayout:
        """Visual tokens lie region by region."""
        return VisualLayout(self.regions, self.max_regions)

    @property
    def looks_ahead(self) -> bool:
        """A mean query has all queries of its region, later ones too."""
        return True

    @property
    def skips_keys(self) -> bool:
        """A decoding step is of text, which reads what it chose, or all."""
        return self.text == "routed" and not self.all_regions

    def reading(self, pictures: PicturesBefore, dims: AttentionDims, number_bytes: int) -> LayerReading | None:
        """Of queries of text."""
        return reading(self, pictures, dims, number_bytes) if self.text == "routed" else None

    def build(self, dims: AttentionDims, key: jax.Array) -> RegionQueries:
        """The mechanism of one layer."""
        return RegionQueries(self)


class RegionQueries(RegionRouter):
    """Routes by means of queries. Without parameters."""

    NEEDS = ("query",)

    def __init__(self, config: BiFormer):
        super().__init__(config.rule, config.regions)
        self.config = config

    def summarise(self, x: Features, region: Int[Array, "B T"], regions: int) -> Summary:
        """Sums over the keys of each region."""
        return descriptors.summarise("mean", x.k, None, region, regions)

    def route(
        self,
        x: Features,
        summary: Summary,
        info_q: TokenInfo,
        info_k: TokenInfo,
        codes: MaskCodes,
        regions: int,
        progress: Float[Array, ""] | None,
    ) -> Routing | None:
        """Each query chooses from what it sees whole, a visual one by the mean query of its region."""
        config = self.config
        if config.all_regions:
            return None
        B, _, K, h = x.k.shape
        routed = (info_q.kind == Kind.VISUAL) | ((info_q.kind == Kind.TEXT) & (config.text == "routed"))
        query = _mean_queries(x.q.astype(jnp.float32), info_q.region, regions)
        nowhere = jnp.zeros((B, regions), jnp.int32)
        descriptor = descriptors.describe("mean", summary, (B, regions, K, h), nowhere)
        before = jnp.where(routed & (info_q.document > 0), codes.hi + 1, NOWHERE)
        return self.routing(query, descriptor, before, info_k, codes, None)


def _mean_queries(q: Float[Array, "B T H h"], region: Int[Array, "B T"], R: int) -> Float[Array, "B T H h"]:
    """Each query's mean over its region; those of no region are their own."""
    (B, _, H, h), nowhere = q.shape, jnp.zeros((q.shape[0], R), jnp.int32)
    mean = descriptors.describe("mean", descriptors.summarise("mean", q, None, region, R), (B, R, H, h), nowhere)
    own = jnp.take_along_axis(mean, jnp.maximum(region - 1, 0)[..., None, None], axis=1)
    return jnp.where(region[..., None, None] > 0, own, q)
