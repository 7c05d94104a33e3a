"""Finds the heads that VHR multiplies: those that a picture changes most.

Source: arXiv 2412.13949, from notes on the paper. With O_h the output of a head at the prompt's last token, before the
output projection, layer by layer, where the layers before are reinforced already:

    VHD_h = | O_h(with the picture) - O_h(without it) |_2
    VHD_h = 0 for heads that surge without the picture
    heads of the layer with VHD_h above the layer's median are multiplied by alpha = 2

in the second layer and the last 14 (LLaVA models of 32 layers; the last 18 of InstructBLIP).

Not in the notes, and ours: a head surges if |O_h(without)| - |O_h(with)| is above its mean plus one standard deviation
over the heads of the layer; the row without the picture is run by the model as it is; heads are multiplied in all
tokens of the prompt. Of several samples the heads are kept that more than half of them choose; the paper chooses for
each prompt alone, as one sample does here.

Rows with the picture and rows without it are one batch, so that a layer meets both and one pass finds all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rave_jax.attention.calibrate.tables import heads_and_layers
from rave_jax.attention.calibrate.traced import Stack, with_mechanism
from rave_jax.attention.vhr import Reinforcing, Vhr
from rave_jax.config import check_fields, require
from rave_jax.typing import Array, Bool, NpArray


@dataclass(frozen=True)
class VhrSearch:
    """Which layers are reinforced, and how much."""

    alpha: float = 2.0
    """What the outputs of the chosen heads are multiplied by."""
    first: tuple[int, ...] = (1,)
    """Early layers that are reinforced, by number from 0."""
    last: int = 14
    """How many layers before the end are reinforced too."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 < self.alpha <= 1e6, "alpha", self.alpha, "a number above 1")
        require(all(n >= 0 for n in self.first), "first", self.first, "numbers of layers, from 0")
        require(self.last >= 0, "last", self.last, "a number of layers, from 0")

    def layers(self, count: int) -> Bool[NpArray, "L"]:
        """Which of so many layers are reinforced.

        Raises:
            ConfigError: the model has no such early layer, or none is reinforced.
        """
        require(all(n < count for n in self.first), "first", self.first, f"numbers from 0 to {count - 1}")
        on = np.arange(count) >= count - self.last
        on[list(self.first)] = True
        require(bool(on.any()), "last", self.last, "at least 1, or layers in `first`")
        return on


def reinforcing[S: Stack](decoder: S, alpha: float, on: Bool[Array, "L"]) -> S:
    """The decoder that finds and reinforces the heads of rows with and without pictures; its gates say which."""
    return with_mechanism(decoder, lambda run: Reinforcing(alpha, on[run.start : run.stop]))


def configs_of(search: VhrSearch, chosen: Bool[NpArray, "N L H"]) -> tuple[Vhr, ...]:
    """The heads that more than half of the samples choose, as mechanisms: one for all layers with equal heads."""
    often: Any = np.mean(chosen, axis=0) > 0.5
    return tuple(Vhr(heads, search.alpha, layers) for heads, layers in heads_and_layers(often))
