"""Attention whose queries choose, region by region, which keys they read."""

from rave_jax.kernels.routed.api import attention
from rave_jax.kernels.routed.base import Choice, RouteRule, Routes, Routing, of_keys, of_regions, open_keys
from rave_jax.kernels.routed.gather import Stack, gather_attention
from rave_jax.kernels.routed.host import HostRegions
from rave_jax.kernels.routed.xla import choice_of

__all__ = [
    "Choice",
    "HostRegions",
    "RouteRule",
    "Routes",
    "Routing",
    "Stack",
    "attention",
    "choice_of",
    "gather_attention",
    "of_keys",
    "of_regions",
    "open_keys",
]
