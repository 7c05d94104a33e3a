"""Attention whose queries choose, region by region, which keys they read."""

from rave_jax.kernels.routed.api import attention
from rave_jax.kernels.routed.base import Choice, RankBias, RouteRule, Routes, Routing, of_keys, open_keys
from rave_jax.kernels.routed.gather import RegionBias, Stack, gather_attention
from rave_jax.kernels.routed.host import HostRegions
from rave_jax.kernels.routed.xla import choice_of

__all__ = [
    "Choice",
    "HostRegions",
    "RankBias",
    "RegionBias",
    "RouteRule",
    "Routes",
    "Routing",
    "Stack",
    "attention",
    "choice_of",
    "gather_attention",
    "of_keys",
    "open_keys",
]
