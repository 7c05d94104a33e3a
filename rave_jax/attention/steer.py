"""Scores of pictures are raised and those of the system prompt lowered, without training: PAI, and AVAR's intervention.

Sources: PAI (arXiv 2407.21771) and PAINT (arXiv 2501.12206, its released code), which change the row that predicts the
next token, and the training-free intervention of AVAR (arXiv 2603.03825, from notes on the paper), which changes all
rows. With s = scale <q, k>, for every head:

    s_ij <- s_ij + image b(s_ij)     for j visual
    s_ij <- s_ij - system b(s_ij)    for j text of the system prompt
    b(s) = |s| (PAI, PAINT), s (AVAR), or 1, a factor e^image of the weight

b(s) = s moves a negative score away from the picture; the other two never do.

PAI's code has a strength of 0.2 in layers 2 to 31 of 32; here `layers` are all until they are named.

Our reading: the rows that predict an answer are those of role response, its header too, while PAI changes the last row
of what is read at once: header rows before the last differ. PAINT gives two strengths to two sets of visual tokens
(`paint.py`); one strength for all of them is what is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Mechanism, Score
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import ScoreFunction, Term, Tile
from rave_jax.typing import Array


@dataclass(frozen=True)
class Steer(MechanismConfig):
    """Scores of visual keys rise by a part of themselves, and those of the system prompt fall (PAI, AVAR)."""

    image: float = 0.0
    """How much the scores of visual keys rise; 0 changes nothing. PAINT has 0.7 for one set of them and 0.3 for
    another, and says that 0.8 breaks the answers."""
    system: float = 0.0
    """How much the scores of the system prompt's text fall; 0 changes nothing."""
    by: Literal["abs", "score", "one"] = "abs"
    """What of: abs is the size of the score (PAI), score the score itself (AVAR), one adds `image` to every score."""
    rows: Literal["response", "all"] = "response"
    """Whose scores: of the tokens of answers with their headers (PAI), or of all tokens (AVAR)."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all. PAINT has all from the third on."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("image", "system"):
            require(0 <= getattr(self, name) <= 1e3, name, getattr(self, name), "a number from 0 to 1000")

    @property
    def skips_keys(self) -> bool:
        """All that it adds to scores is a term."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if both strengths are 0."""
        return Steering(self) if self.image or self.system else Mechanism()


@dataclass(frozen=True)
class Part(ScoreFunction):
    """A key's strength times a part of the score."""

    by: Literal["abs", "score"]

    def __call__(self, tile: Tile) -> Array:
        """The bias of every pair."""
        return tile.key["strength"] * (jnp.abs(tile.dot) if self.by == "abs" else tile.dot)


@dataclass(frozen=True)
class Added(ScoreFunction):
    """A key's strength, whatever the score: it leaves the score to other mechanisms of the layer."""

    def __call__(self, tile: Tile) -> Array:
        """The bias of every pair."""
        return tile.key["strength"]


class Steering(Mechanism):
    """The strength of each key. Without parameters."""

    def __init__(self, config: Steer):
        self.config = config

    def score(self, x: Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """Visual keys and those of the system prompt."""
        config, system = self.config, (info_k.kind == Kind.TEXT) & (info_k.role == Role.SYSTEM)
        strength = jnp.where(info_k.kind == Kind.VISUAL, config.image, jnp.where(system, -config.system, 0.0))
        rows = info_q.role == Role.RESPONSE if config.rows == "response" else info_q.document > 0
        function = Added() if config.by == "one" else Part(config.by)
        return Score(terms=(Term(function, key={"strength": strength}, query_on=rows, key_on=strength != 0),))
