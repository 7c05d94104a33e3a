"""Attention with masks as data and an additive query-key bias that is never stored."""

from rave_jax.kernels.attention.api import attention, choose
from rave_jax.kernels.attention.base import Implementation, KeyGroups, MaskCodes, PairBias, PairForm, Terms

__all__ = ["Implementation", "KeyGroups", "MaskCodes", "PairBias", "PairForm", "Terms", "attention", "choose"]
