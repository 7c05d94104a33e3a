"""Gaze over regions that are not those of the model's layout, in layers of its own.

A token has one region number, and the cache one order of visual keys: those of the layout that the first mechanism
with regions asks for. A layer that wants others finds each token's region from its place in its picture, and pools all
keys by it, in training, prefill and decoding alike. Every query reads what it chose; a decoding step reads all visual
keys of such a layer, and saves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Keys, Mechanism
from rave_jax.attention.declared import LayeredConfig
from rave_jax.attention.gaze.descriptors import Summary
from rave_jax.attention.gaze.router import GazeRouter
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.routed import Routing
from rave_jax.layout import FixedRegions, VisualLayout
from rave_jax.typing import Array, Float, Int

if TYPE_CHECKING:
    from rave_jax.attention.gaze.config import Gaze


@dataclass(frozen=True)
class GazeElsewhere(LayeredConfig):
    """What a model makes of a `Gaze` whose regions are not those of its layout; no config names it."""

    gaze: Gaze
    """The config that stands among the mechanisms."""

    @property
    def layers(self) -> str | tuple[int, ...]:
        """Those of the config."""
        return self.gaze.layers

    @property
    def called(self) -> str:
        """Errors name the config."""
        return self.gaze.called

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer."""
        return RouterElsewhere(self.gaze, dims)


def elsewhere(gaze: Gaze, layout: VisualLayout) -> GazeElsewhere:
    """The config of its layers in a model of this layout.

    Raises:
        ConfigError: it cannot find or count its regions beside the layout; says why, and what to do.
    """
    regions = gaze.regions
    beside = f"mechanisms: {gaze.called} has other regions than the model's layout ({layout.regions})"
    if regions == layout.regions:
        raise ConfigError(
            f"mechanisms: two ask for {regions} with max_regions {layout.max_regions} and {gaze.max_regions}, but "
            "a row has one budget of them; give both the same max_regions"
        )
    if not isinstance(regions, FixedRegions):
        raise ConfigError(
            f"{beside}, and {regions}: how large these are depends on the picture, and rows are planned by the layout "
            "alone; put it first among the mechanisms, or give it FixedRegions"
        )
    if gaze.visual_queries != "dense":
        raise ConfigError(
            f"{beside}, and visual_queries {gaze.visual_queries!r}: which region a visual query is in is known of the "
            "layout alone; put it first among the mechanisms, or set visual_queries to 'dense'"
        )
    most = regions.most_beside(layout)
    if gaze.max_regions < most:
        raise ConfigError(
            f"{beside}, and max_regions {gaze.max_regions}, expected at least {most}, the most {regions} of a row "
            f"with {layout.max_regions} regions of the layout, by which rows are planned"
        )
    return GazeElsewhere(gaze)


def regions_of(info: TokenInfo, regions: FixedRegions) -> Int[Array, "B S"]:
    """The region of every token, from 1, picture by picture in the order of documents and their tokens; 0 of what is
    not visual. A picture counts as soon as one of its tokens is there."""
    # The rule of the layout is of whole numbers, and takes arrays of them as well.
    grid: Any = (info.grid_t, info.grid_h, info.grid_w)
    places: Any = (info.frame, info.row, info.col)
    shape: Any = regions.shape(grid)
    count = shape[0] * shape[1] * shape[2]
    frame, row, col = regions.coordinates(places, grid)
    local = (frame * shape[1] + row) * shape[2] + col
    there = (info.document > 0) & (info.image > 0)

    def before(document: Array, offset: Array, image: Array, there: Array, count: Array) -> Array:
        order = jnp.lexsort((offset, document))
        number = jnp.where(there, image, 0)[order]
        # Tokens of a picture stand side by side in their document.
        other = (number != jnp.roll(number, 1)) | (document[order] != jnp.roll(document[order], 1))
        first = (other | (jnp.arange(len(order)) == 0)) & (number > 0)
        ends = jnp.cumsum(jnp.where(first, count[order], 0))
        return jnp.zeros_like(count).at[order].set(ends - count[order])

    start = jax.vmap(before)(info.document, info.offset, info.image, there, count)
    return jnp.where(there & (info.kind == Kind.VISUAL), start + local + 1, 0)


class PooledElsewhere(NamedTuple):
    """The region of every key, and what ranks the regions."""

    region: Int[Array, "B S"]
    summary: Summary


class RouterElsewhere(Mechanism):
    """Routes over regions that it makes itself, as Gaze's own router says. Parameters are those of that."""

    OWNS = ("route",)
    OWN_REGIONS: ClassVar[bool] = True

    def __init__(self, gaze: Gaze, dims: AttentionDims):
        self.gaze, self.router = gaze, GazeRouter(gaze, dims)
        self.NEEDS = () if gaze.descriptor_keys == "pre_rope" else ("query",)
        self.WANTS = ("terms",) if gaze.rank_with_bias else ()

    def remember(self, x: Features) -> Float[Array, "B T K h"] | None:
        """Keys before RoPE, where these rank regions."""
        return x.k0 if self.gaze.descriptor_keys == "pre_rope" else None

    def pool(self, keys: Keys, own: int, info_k: TokenInfo) -> PooledElsewhere:
        """Sums or extremes over the keys of each region."""
        assert isinstance(self.gaze.regions, FixedRegions)
        region = regions_of(info_k, self.gaze.regions)
        k = keys.k if self.gaze.descriptor_keys == "post_rope" else keys.remembered[own]
        return PooledElsewhere(region, self.router.summary_of(k, region, self.gaze.max_regions))

    def route(
        self,
        x: Features,
        summary: PooledElsewhere,
        info_q: TokenInfo,
        info_k: TokenInfo,
        codes: MaskCodes,
        regions: int,
        progress: Float[Array, ""] | None,
    ) -> Routing:
        """What each query chooses from, and how."""
        own = info_k._replace(region=summary.region)
        return self.router.route(x, summary.summary, info_q, own, codes, self.gaze.max_regions, progress)
