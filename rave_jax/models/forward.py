"""What is asked of a model, and what it gives: small trees of arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from rave_jax.attention import ChoiceSums, Statistics, WantedStatistics
from rave_jax.batch import TokenInfo
from rave_jax.typing import Array, Bool, Float, Int


class ImageFeatures(NamedTuple):
    """What the tower makes of rows of patches, U merge units in each row.

    Fields:
        tokens: the visual token of each merge unit.
        deep: what is added to the visual tokens behind each of the first decoder layers (DeepStack, arXiv 2406.04334);
            empty where the tower gives none.
        looks: the attention that the tower's class token gives each merge unit, summed over heads, in its first block
            and in its last but one; None where no mechanism reads it.
    """

    tokens: Float[Array, "B U D"]
    deep: tuple[Float[Array, "B U D"], ...] = ()
    looks: Float[Array, "B U 2"] | None = None


class Embedded(NamedTuple):
    """Tokens of rows as they enter the decoder.

    Fields:
        x: embedded tokens, visual and context tokens among them.
        deep: as in `ImageFeatures`; empty where no token is visual.
        unit: which merge unit of `deep` each token gets; U, which is none, for those that get nothing. None without
            `deep`.
    """

    x: Float[Array, "B T D"]
    deep: tuple[Float[Array, "B U D"], ...] = ()
    unit: Int[Array, "B T"] | None = None


class Chunk(NamedTuple):
    """The next tokens of rows, padding (document 0) on the right, those of pictures in the order of their offsets.

    Fields:
        tokens, info, positions: as in `Batch`.
        visual_index: as in `Batch`; None where every token is text.
        region_offset: how many tokens of its region stand before each token; None where every token is text, and for a
            model without regions.
    """

    tokens: Int[Array, "B T"]
    info: TokenInfo
    positions: Int[Array, "3 B T"]
    visual_index: Int[Array, "B T"] | None = None
    region_offset: Int[Array, "B T"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Want:
    """What a forward pass is asked for beside hidden states. What is not asked for is not computed."""

    queries: Int[Array, "B N"] | None = None
    """Queries, by index, whose attention is wanted in every layer, and whose choice in every layer that routes."""
    losses: bool = field(default=False, metadata={"static": True})
    """Are the mechanisms' losses wanted?"""
    inputs: bool = field(default=False, metadata={"static": True})
    """Are the hidden states wanted that enter each layer?"""
    gates: bool = field(default=False, metadata={"static": True})
    """Is it wanted what the outputs of heads are multiplied by?"""
    statistics: WantedStatistics | None = None
    """Which sums over rows and columns of the map are wanted in every layer."""
    choices: bool = field(default=False, metadata={"static": True})
    """Are sums wanted over what queries choose, where layers route?"""
    progress: Float[Array, ""] | None = None
    """How far the training run is, 0 to 1, for what mechanisms schedule; None is its end."""


HIDDEN = Want()
"""Asks for hidden states alone."""


class Output(NamedTuple):
    """What a forward pass gives.

    Fields:
        hidden: hidden states after the final norm.
        attention: float32 attention of the asked-for queries over all keys, in the layers that have attention; None if
            not asked for.
        chosen: which regions these queries chose, in the layers that route, in order; None if not asked for, or where
            no layer routes.
        losses: what the mechanisms add to the training loss, by name: sums over these rows and all layers, to be
            divided by `loss_weights` of all rows that are averaged over; empty if not asked for.
        inputs: hidden states that enter each layer; None if not asked for.
        gates: what the mechanisms multiply the outputs of heads by, in the layers that have attention; None if not
            asked for.
        statistics: sums over rows and columns of the map, in the layers that have attention; None if not asked for.
        choices: sums [L] over what queries choose, of the layers of each mechanism that routes, by its name; None if
            not asked for.
    """

    hidden: Float[Array, "B T D"]
    attention: Float[Array, "L B N H S"] | None
    chosen: Bool[Array, "L B N H R"] | None
    losses: dict[str, Float[Array, ""]]
    inputs: Float[Array, "L B T D"] | None
    gates: Float[Array, "L B T H"] | None = None
    statistics: Statistics | None = None
    choices: dict[str, ChoiceSums] | None = None
