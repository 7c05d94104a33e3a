"""PAINT: while an answer is written, scores of two sets of visual tokens rise by a part of their size.

Source: arXiv 2501.12206 and its released code, which extends PAI (`steer.py`). With a_p the attention that the vision
tower's class token gives patch p, summed over heads, each picture has two sets of patches:

    summary: a_p in the last block but one lies above Q3 + 1.5 (Q3 - Q1) of the picture's
    local:   the 25 % of largest a_p in the first block, without those of summary

    s_ij <- s_ij + alpha |s_ij|    for j local        s_ij <- s_ij + beta |s_ij|    for j summary

for every head, with s = scale <q, k>. Certain: all of it, from the code; quartiles are those of numpy.

Our reading: rows are those of the answer, with the header of its message; the source changes the last row of what is
read at once. A visual token that is a sum of several patches has the sum of their attention. Left out: the third set of
its code (spatial, off by default), and the modulation by heads that its abstract names and its code does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Mechanism, Score
from rave_jax.attention.declared import ALL, Layers, MechanismConfig, NamedLayers
from rave_jax.attention.prompted import Prompted, PromptPass, PromptSizes
from rave_jax.attention.pruning import ranks
from rave_jax.attention.steer import Part
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import Term
from rave_jax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class Paint(MechanismConfig):
    """Scores of the visual tokens that the vision tower's class token looks at rise (PAINT); found for each prompt."""

    WORDS: ClassVar = {"all": ALL, "later": NamedLayers(slice(2, None), "all layers that attend but the first two")}
    local: float = 0.7
    """alpha: strength on the tokens that the first block looks at. The paper says that 0.8 breaks the answers."""
    summary: float = 0.3
    """beta: strength on the outliers of the last block but one; the paper's best is 0.4. 0 with `local` 0 changes
    nothing."""
    share: float = 0.25
    """Share of a picture's tokens that are local, rounded down."""
    layers: Layers | Literal["later"] = "later"
    """Decoder layers that use it, by global number, all, or later: all that attend but the first two."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("local", "summary"):
            require(0 <= getattr(self, name) <= 1e3, name, getattr(self, name), "a number from 0 to 1000")
        require(0 <= self.share <= 1, "share", self.share, "a share from 0 to 1")

    @property
    def of_prompt(self) -> bool:
        """The sets are found for each prompt."""
        return self.local > 0 or self.summary > 0

    @property
    def reads_class_token(self) -> bool:
        """Both sets are what it looks at."""
        return self.of_prompt

    @property
    def skips_keys(self) -> bool:
        """All that it adds to scores is a term."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if both strengths are 0."""
        return Painting(self) if self.of_prompt else Mechanism()


class Painting(Prompted):
    """Raises scores; its numbers are the set of each token by its offset [B,S]: 1 is local, 2 summary, 0 neither."""

    def __init__(self, config: Paint):
        super().__init__()
        self.config = config

    @property
    def shared(self) -> dict[str, float]:
        """The sets are one for all layers."""
        return {"share": self.config.share}

    def neutral(self, rows: int, sizes: PromptSizes) -> Int[Array, "rows S"]:
        """No sets."""
        return jnp.zeros((rows, sizes.tokens), jnp.int32)

    def found(self, prompts: PromptPass, sizes: PromptSizes) -> Int[Array, "N S"]:
        """Both sets."""
        info, looks = prompts.info, prompts.looks
        if looks is None:
            return self.neutral(info.document.shape[0], sizes)
        of = sets_of(looks, info, self.config.share)
        rows = jnp.arange(of.shape[0])[:, None]
        return self.neutral(of.shape[0], sizes).at[rows, info.offset].max(of, mode="drop")

    def score(self, x: Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """Rows of the answer, and both sets."""
        config = self.config
        of = jnp.take_along_axis(self.numbers, info_k.offset, axis=1, mode="clip")
        of = jnp.where(info_k.kind == Kind.VISUAL, of, 0)
        strength = jnp.where(of == LOCAL, config.local, jnp.where(of == SUMMARY, config.summary, 0.0))
        rows = info_q.role == Role.RESPONSE
        return Score(terms=(Term(Part("abs"), key={"strength": strength}, query_on=rows, key_on=strength != 0),))


LOCAL, SUMMARY = 1, 2


def sets_of(looks: Float[Array, "B T 2"], info: TokenInfo, share: float) -> Int[Array, "B T"]:
    """The set of each token.

    Args:
        looks: what the class token gives each visual token in the first block, and in the last but one.
        info: token codes; pictures are told apart by `image`.
        share: of a picture's tokens, how many are local.
    """
    visual = (info.document > 0) & (info.kind == Kind.VISUAL)
    picture = jnp.where(visual, info.image, info.image.shape[1])
    rank, count = ranks(looks[..., 0], picture)
    # A quarter of 576 is 144, whatever a product of floats says.
    local = rank < jnp.floor(share * count + 1e-4)
    return jnp.where(visual, jnp.where(outliers(looks[..., 1], picture), SUMMARY, jnp.where(local, LOCAL, 0)), 0)


def outliers(x: Float[Array, "B T"], group: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which numbers lie above Q3 + 1.5 (Q3 - Q1) of their group, one of 0 to T."""
    rank, count = ranks(x, group)
    most = group.shape[1] + 1

    def at(place: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """The number of each token's group that has this place, the least first."""
        mine = jnp.where(rank == count - 1 - place, x, 0.0)
        sums = jax.vmap(lambda x, group: jax.ops.segment_sum(x, group, most))(mine, group)
        return jnp.take_along_axis(sums, group, axis=1)

    def quartile(n: int) -> Float[Array, "B T"]:
        low, part = (count - 1) * n // 4, ((count - 1) * n % 4) / 4
        return (1 - part) * at(low) + part * at(jnp.minimum(low + 1, count - 1))

    first, third = quartile(1), quartile(3)
    return x > third + 1.5 * (third - first)
