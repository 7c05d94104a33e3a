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

from rave_jax.attention.base import AttentionDims
from rave_jax.attention.cost import LayerReading, PicturesBefore
from rave_jax.attention.declared import LayeredConfig, Layers, MechanismConfig
from rave_jax.attention.gaze.cost import reading
from rave_jax.attention.gaze.descriptors import DescriptorName
from rave_jax.attention.gaze.elsewhere import elsewhere
from rave_jax.attention.gaze.router import GazeRouter
from rave_jax.config import check_fields, require
from rave_jax.kernels.routed import RouteRule
from rave_jax.layout import FixedRegions, Regions, VisualLayout
from rave_jax.typing import Array, Float


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

    def in_layout(self, layout: VisualLayout) -> LayeredConfig:
        """In layers of its own it may have other regions than the model's layout."""
        return self if layout.regions is None or self.layout == layout else elsewhere(self, layout)

    def build(self, dims: AttentionDims, key: jax.Array) -> GazeRouter:
        """The mechanism of one layer."""
        return GazeRouter(self, dims)
