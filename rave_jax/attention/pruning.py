"""Pruning: the visual tokens that a prompt's last token attends to least leave, with its bias for places taken out.

Sources: FastV (arXiv 2403.06764): the mean over heads of the last row's attention to each visual token ranks them, and
behind the layer only the first of them go on. Attention debiasing (arXiv 2508.17807, github intcomp/attention-bias
e75ebe7): that attention grows with the token's place in the picture whatever is there, so it is divided by a curve,

    a_i / f(i / L)        f(x) = mu exp(sigma x)

with i the place of the token among the L of its picture. mu changes no rank. `rave-jax calibrate debias` fits sigma
(`rave_jax/attention/calibrate/debias.py`); sigma 0 is FastV. What is left on padding, patches of more than half of
which is the border of a picture, is then set to 0, and no more tokens stay than there are others.

Ours: which token is the last one of a prompt (`tokens.py`); several pictures of a prompt are ranked together, each
by its own places; places count frame by frame and row by row. A share is of all visual tokens, padding among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Candidates, Mechanism
from rave_jax.attention.declared import ALL_BUT_LAST, Layers, MechanismConfig
from rave_jax.batch import TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class Pruning(MechanismConfig):
    """Visual tokens that get little attention leave after a layer (FastV, attention debiasing)."""

    WORDS: ClassVar = {"all": ALL_BUT_LAST}
    keep: float = 0.5
    """Share of the visual tokens there are that stay behind each layer of `layers`, to the nearest number; 1 changes
    nothing."""
    slope: float = 0.0
    """sigma of the bias for places that is taken out, as `rave-jax calibrate debias` finds it; 0 ranks by attention
    as it is."""
    padding: Literal["ranked", "leaves"] = "ranked"
    """What becomes of visual tokens that show more of the border of a picture than of the picture, as LLaVA's `do_pad`
    makes them: they are ranked as all others (FastV), or they leave, before all others (debiasing)."""
    layers: Layers = (1,)
    """Decoder layers, by global number, whose attention ranks and behind which tokens leave; FastV has the second. All
    means all but the last."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 <= self.keep <= 1, "keep", self.keep, "a share from 0 to 1")
        require(abs(self.slope) <= 30, "slope", self.slope, "a number from -30 to 30")

    @property
    def looks_ahead(self) -> bool:
        """A prompt's last token decides."""
        return self.keep < 1

    def stays(self, visual: int, pictures: int) -> tuple[int, ...] | None:
        """Shares of each prompt, to the nearest number, and tokens that always stay."""
        # A prompt with a picture rounds up by a half at most, and one token of it and of the document may always stay.
        return None if self.keep == 1 else (min(visual, math.ceil(self.keep * visual) + 2 * pictures + 1),)

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if all stay."""
        return Mechanism() if self.keep == 1 else Pruner(self)


class Pruner(Mechanism):
    """Ranks by attention. Without parameters."""

    OWNS = ("tokens",)
    RANKS = True

    def __init__(self, config: Pruning):
        self.config = config

    def tokens(self, given: Candidates) -> Bool[Array, "B T"]:
        """The first of each prompt."""
        assert given.received is not None
        config, leaves = self.config, jnp.zeros(given.by.shape, bool)
        # By the log: a quotient of small numbers would round to one rank.
        debiased = jnp.log(given.received) - config.slope * place_of(given.info)
        if config.padding == "leaves":
            # Behind a token without attention too.
            leaves = given.info.padded > 0
            debiased = jnp.where(leaves, -jnp.inf, jnp.maximum(debiased, jnp.finfo(jnp.float32).min))
        rank, count = ranks(debiased, given.by)
        return (rank < jnp.floor(config.keep * count + 0.5)) & ~leaves


def place_of(info: TokenInfo) -> Float[Array, "B T"]:
    """i / L of visual tokens: the place in the picture over the number of its tokens, 0 up to 1."""
    place = (info.frame * info.grid_h + info.row) * info.grid_w + info.col
    return place / jnp.maximum(info.grid_t * info.grid_h * info.grid_w, 1)


def ranks(score: Float[Array, "B T"], by: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The rank, from 0, of each token among those that one token decides about, the largest score first and of equal
    ones the first; and how many these are."""
    T = by.shape[1]

    def of_row(score: Array, by: Array) -> tuple[Array, Array]:
        order = jnp.lexsort((-score, by))
        count = jnp.zeros(T + 1, jnp.int32).at[by].add(1)
        first = jnp.cumsum(count) - count
        place = jnp.zeros(T, jnp.int32).at[order].set(jnp.arange(T, dtype=jnp.int32))
        return place - first[by], count[by]

    return jax.vmap(of_row)(score, by)
