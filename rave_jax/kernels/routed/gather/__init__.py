"""Attention of one new token to the regions that it chose, read from a cache that is laid out by regions."""

from rave_jax.kernels.routed.gather.api import gather_attention
from rave_jax.kernels.routed.gather.base import Stack

__all__ = ["Stack", "gather_attention"]
