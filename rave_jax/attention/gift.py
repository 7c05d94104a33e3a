"""GIFT: while an answer is written, heads look more at what the question's words made the model look at.

Source: arXiv 2510.22067 and its released code. With P the attention of one row, V the visual tokens, Q the question's
tokens and S_j the saliency of visual token j, found once for each prompt:

    D_hij = max(P_hij - P_h(i-1)j, 0)           i in Q, j in V, in one layer, by a pass of its own
    S_j   = mean of D_hij over i and over the half of the heads with the largest sum of D
    S     is limited to its mean plus and minus three standard deviations, and moved to 0 .. 1
    in the row that chooses a token, in the layers that are changed:
        P_j <- exp(alpha S_j) P_j on V, in the half of the heads that look at V most;  r = their sum after / before
        P_j <- beta r P_j on Q, in the half of the heads that look at Q most;          rows are normalised again

with r one number for a layer. Defaults are those of Qwen2-VL-7B. Certain: all of it, from the code.

Our reading: i are tokens of the last question behind its first picture, of content words alone, and all where it has
none. The source finds these words with a tagger; here they are what a list leaves (`inference/content.py`). Rows that
are changed are those of the answer, with the header of its message; the source changes the last row of the prompt and
every row behind it. Q of a row is the question of its turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Mechanism, Owned
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.prompted import Prompted, PromptPass, PromptSizes, largest_half
from rave_jax.attention.statistics import WantedStatistics
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.typing import Array, Bool, Float


@dataclass(frozen=True)
class Gift(MechanismConfig):
    """Answers look more at what the question's words looked at (GIFT); found for each prompt that is answered."""

    alpha: float = 4.0
    """Strength on visual tokens. The paper has 5 for LLaVA-1.5, 4 for Qwen2-VL-7B; 0 with beta 1 changes nothing."""
    beta: float = 1.0
    """Strength on the question, beside r; the released code has 1."""
    saliency_layer: int = 14
    """Decoder layer in which saliency is found, by global number: 11 of LLaVA-1.5-7B, 10 of 13B, 14 of Qwen2-VL-7B."""
    words: Literal["content", "all"] = "content"
    """Which tokens of the question count for saliency: of content words, or all."""
    layers: Layers = tuple(range(5, 19))
    """Decoder layers that are changed, by global number, or all: 12 to 22 of LLaVA-1.5-7B, 14 to 20 of 13B, 5 to 18 of
    Qwen2-VL-7B."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 <= self.alpha <= 50, "alpha", self.alpha, "a number from 0 to 50")
        require(0 < self.beta <= 1e6, "beta", self.beta, "a number above 0")
        require(self.saliency_layer >= 0, "saliency_layer", self.saliency_layer, "the number of a layer, from 0")

    @property
    def of_prompt(self) -> bool:
        """Saliency is found for each prompt."""
        return bool(self.alpha) or self.beta != 1

    @property
    def other_layers(self) -> Mapping[str, int]:
        """Where saliency is found."""
        return {"saliency_layer": self.saliency_layer} if self.of_prompt else {}

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if alpha is 0 and beta 1."""
        return GazeShift(self) if self.of_prompt else Mechanism()


class GazeShift(Prompted):
    """Changes the rows of answers; its numbers are the saliency of the prompt's tokens by offset, [B,S]."""

    NEEDS: tuple[Owned, ...] = ("route",)

    def __init__(self, config: Gift):
        super().__init__()
        self.config = config

    @property
    def words(self) -> bool:
        """Are the question's rows those of content words?"""
        return self.config.words == "content"

    @property
    def shared(self) -> Mapping[str, Any]:
        """Saliency is one for all layers."""
        return {"saliency_layer": self.config.saliency_layer, "words": self.config.words}

    def wanted(self, info: TokenInfo, content: Bool[Array, "N T"] | None) -> WantedStatistics:
        """Rises along the question."""
        return WantedStatistics(question_rows(info, content).astype(jnp.float32), rises=True)

    def neutral(self, rows: int, sizes: PromptSizes) -> Float[Array, "rows S"]:
        """Zeros."""
        return jnp.zeros((rows, sizes.tokens), jnp.float32)

    def found(self, prompts: PromptPass, sizes: PromptSizes) -> Float[Array, "N S"]:
        """Saliency of the layer in which it is found."""
        assert prompts.statistics is not None and prompts.statistics.rises is not None
        layer = sizes.layers.index(self.config.saliency_layer)
        return saliency_of(prompts.statistics.rises[layer], prompts.info, sizes.tokens)

    def reweighs(self, info_q: TokenInfo) -> Bool[Array, "B T"]:
        """Text of the answer, its header among it."""
        return (info_q.kind == Kind.TEXT) & (info_q.role == Role.RESPONSE)

    def reweigh(self, rows: Float[Array, "B N H S"], info_q: TokenInfo, info_k: TokenInfo) -> Float[Array, "B N H S"]:
        """Both strengths, and rows that add up to 1 again."""
        config, saliency = self.config, self.numbers
        visual = (info_k.kind == Kind.VISUAL)[:, None, None]
        mine = jnp.take_along_axis(saliency, info_k.offset, axis=1, mode="clip")[:, None, None]
        asks = ((info_k.kind == Kind.TEXT) & (info_k.role == Role.QUESTION))[:, None]
        asks = (asks & (info_k.turn[:, None] == info_q.turn[:, :, None]))[:, :, None]
        before = jnp.sum(jnp.where(visual, rows, 0.0), axis=-1)
        stronger = rows * jnp.where(visual, jnp.exp(config.alpha * mine), 1.0)
        after = jnp.sum(jnp.where(visual, stronger, 0.0), axis=-1)
        looks = largest_half(before)
        total = jnp.sum(jnp.where(looks, before, 0.0), axis=-1, keepdims=True)
        more = jnp.sum(jnp.where(looks, after, 0.0), axis=-1, keepdims=True)
        ratio = jnp.where(total > 0, more / jnp.where(total > 0, total, 1.0), 1.0)
        reads = largest_half(jnp.sum(jnp.where(asks, rows, 0.0), axis=-1))
        made = jnp.where(looks[..., None], stronger, rows)
        made = made * jnp.where(asks & reads[..., None], config.beta * ratio[..., None], 1.0)
        return made / jnp.maximum(jnp.sum(made, axis=-1, keepdims=True), 1e-30)


def question_rows(info: TokenInfo, content: Bool[Array, "B T"] | None = None) -> Bool[Array, "B T"]:
    """Tokens of each row's last question behind its first picture; one document a row.

    Args:
        info: of the rows.
        content: which tokens count, where a question has one of them; None: all.
    """
    real = info.document > 0
    last = jnp.max(jnp.where(real, info.turn, 0), axis=1, keepdims=True)
    behind = jnp.cumsum(real & (info.kind == Kind.VISUAL), axis=1) > 0
    asks = real & behind & (info.kind == Kind.TEXT) & (info.role == Role.QUESTION) & (info.turn == last)
    if content is None:
        return asks
    return asks & (content | ~jnp.any(asks & content, axis=1, keepdims=True))


def saliency_of(rises: Float[Array, "B S H"], info: TokenInfo, size: int) -> Float[Array, "B size"]:
    """S of each token by its offset, 0 of those that are not visual.

    Args:
        rises: of the question's rows, in the layer where saliency is found.
        info: of the rows; one document each.
        size: how many offsets there may be.
    """
    visual = (info.document > 0) & (info.kind == Kind.VISUAL)
    seen = jnp.where(visual[..., None], rises, 0.0)
    heads = largest_half(jnp.sum(seen, axis=1))
    mean = jnp.sum(jnp.where(heads[:, None], seen, 0.0), axis=-1)
    count = jnp.maximum(jnp.sum(visual, axis=1, keepdims=True), 1)
    middle = jnp.sum(mean, axis=1, keepdims=True) / count
    off = jnp.sqrt(jnp.sum(jnp.where(visual, (mean - middle) ** 2, 0.0), axis=1, keepdims=True) / count)
    limited = jnp.clip(mean, middle - 3 * off, middle + 3 * off)
    low = jnp.min(jnp.where(visual, limited, jnp.inf), axis=1, keepdims=True)
    high = jnp.max(jnp.where(visual, limited, -jnp.inf), axis=1, keepdims=True)
    span = high - low
    found = jnp.where(visual & (span > 0), (limited - low) / jnp.where(span > 0, span, 1.0), 0.0)
    B = found.shape[0]
    return jnp.zeros((B, size), jnp.float32).at[jnp.arange(B)[:, None], info.offset].add(found, mode="drop")
