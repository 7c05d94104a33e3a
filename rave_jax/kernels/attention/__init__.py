"""Attention with masks as data and an additive query-key bias that is never stored."""

from rave_jax.kernels.attention.api import OPERATION, attention
from rave_jax.kernels.attention.base import Implementation, KeyGroups, MaskCodes, PairBias, PairForm, Terms

__all__ = ["OPERATION", "Implementation", "KeyGroups", "MaskCodes", "PairBias", "PairForm", "Terms", "attention"]
