"""What mechanisms have in common that route over the regions of the model's layout."""

from __future__ import annotations

from rave_jax.attention.base import Mechanism
from rave_jax.attention.gaze import descriptors
from rave_jax.attention.gaze.descriptors import Summary
from rave_jax.attention.gaze.places import bounds
from rave_jax.batch import TokenInfo
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.routed import RouteRule, Routes, Routing
from rave_jax.layout import Regions
from rave_jax.typing import Array, Float, Int


class RegionRouter(Mechanism):
    """Routes the queries of one layer over regions, of which it keeps sums or extremes of keys."""

    OWNS = ("route",)

    def __init__(self, rule: RouteRule, regions: Regions):
        self.rule, self.regions = rule, regions

    def combine(self, old: Summary, new: Summary) -> Summary:
        """Of the keys of both."""
        return descriptors.combine(old, new)

    def routing(
        self,
        query: Float[Array, "B T H c"],
        descriptor: Float[Array, "B R K c"],
        before: Int[Array, "B T"],
        info_k: TokenInfo,
        codes: MaskCodes,
        dense: Float[Array, ""] | None,
    ) -> Routing:
        """What queries choose from, and how; the arguments are fields of `Routes`."""
        first, last = bounds(codes.order, info_k.region, descriptor.shape[1])
        routes = Routes(query, descriptor, first, last, before, info_k.region, dense)
        return Routing(routes, self.rule, self.regions.tokens)
