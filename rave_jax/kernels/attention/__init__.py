"""Attention with masks as data and score functions whose biases are never stored."""

from rave_jax.kernels.attention.api import OPERATION, attention
from rave_jax.kernels.attention.base import Implementation, KeyGroups, MaskCodes, Terms
from rave_jax.kernels.attention.score import ScoreFunction, Term, Tile

__all__ = [
    "OPERATION",
    "Implementation",
    "KeyGroups",
    "MaskCodes",
    "ScoreFunction",
    "Term",
    "Terms",
    "Tile",
    "attention",
]
