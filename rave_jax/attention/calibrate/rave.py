"""Chooses the heads that get a RAVE gate: those that look at pictures most.

A note on the paper (arXiv 2605.18359) says that selected heads get the bias, and not how they are selected. Ours: the
share of all heads of the model whose text queries give most of their attention to visual tokens, on samples with
pictures, before a gate is trained. Compare it with a gate on all heads (`Rave.heads`, the default).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rave_jax.attention.calibrate.tables import heads_and_layers
from rave_jax.attention.rave import Rave
from rave_jax.config import check_fields, require
from rave_jax.typing import Bool, Float, NpArray


@dataclass(frozen=True)
class RaveSearch:
    """How many heads get a gate."""

    fraction: float = 0.5
    """Heads that get a gate, as a part of all heads of the model; at least one does."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 < self.fraction <= 1, "fraction", self.fraction, "a number above 0, at most 1")

    def chosen(self, mass: Float[NpArray, "L H"]) -> Bool[NpArray, "L H"]:
        """The heads with the largest mass; of equal ones the first."""
        count = max(1, round(self.fraction * mass.size))
        heads = np.zeros(mass.size, bool)
        heads[np.argsort(-mass.ravel(), kind="stable")[:count]] = True
        return heads.reshape(mass.shape)


def configs_of(chosen: Bool[NpArray, "L H"]) -> tuple[Rave, ...]:
    """The mechanisms to put into a model's config: one for all layers with the same heads, none for layers without."""
    L, H = chosen.shape
    return tuple(
        Rave(heads="all" if len(heads) == H else heads, layers="all" if len(layers) == L else layers)
        for heads, layers in heads_and_layers(chosen)
    )
