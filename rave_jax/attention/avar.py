"""AVAR's training losses: what follows a picture should look at it, and less at the system prompt.

Source: arXiv 2603.03825 and its released code (the AGTO losses, weights 0.15 each, eps 1e-6). For a sample whose rows
are R, visual keys V and system keys SYS, with P the attention of one layer and head:

    L_enh = - mean over layers and heads of  log( 1 / (|R| |V|)   sum over R and V of P    + eps )
    L_sup =   mean over layers and heads of  log( 1 / (|R| |SYS|) sum over R and SYS of P  + eps )

averaged over samples. Sums of P come from the log-sum-exps of the key groups V, SYS and the rest, so no map is made.

R is the user's turn, from the first user message to the answer, its picture among it: so it is in the code that was
released for training, where R goes on through the answer's header, which here is the answer's. What the paper says R is
could not be read; with `rows="response"` R is the answer. The code leaves a BOS token out of SYS where a tokenizer has
one (Qwen's has none); here it is in SYS.

Our reading: a sample is a document of a packed row, and one with several pictures, questions or answers has all of them
in V and R. R is every token of role question, or of role response, the answer's header too, and SYS the text of role
system. A document without rows or picture has no L_enh, and one without rows or system prompt no L_sup: the means are
over those that have. P is the attention after all mechanisms of the layer, and layers that do not use it do not count.
At inference it does nothing and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Mechanism, Parts
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.masks import sums_by_document
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import KeyGroups
from rave_jax.typing import Array, Bool, Float, Int

VISUAL, SYSTEM, COUNT = 1, 2, 3
"""Numbers of the key groups; all other keys are in group 0."""


@dataclass(frozen=True)
class Avar(MechanismConfig):
    """Two terms of the training loss on how much questions, or answers, attend to the picture and to the system
    prompt."""

    enhance: float = 0.15
    """Weight of L_enh, which raises attention to the picture."""
    suppress: float = 0.15
    """Weight of L_sup, which lowers attention to the system prompt."""
    eps: float = 1e-6
    """Added to the mean attention to the picture, and to the system prompt, before its logarithm."""
    rows: Literal["prompt", "response"] = "prompt"
    """Whose attention counts: of the user's turns with their pictures, as in the released code, or of the answers."""
    layers: Layers = "all"
    """Decoder layers whose attention counts, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("enhance", "suppress"):
            require(0 <= getattr(self, name) <= 1e6, name, getattr(self, name), "a number from 0 to 1e6")
        # At least what float32 holds.
        require(1e-37 <= self.eps <= 1, "eps", self.eps, "a small positive number, from 1e-37 to 1")

    @classmethod
    def from_older(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON of one as it is written, from one without rows, which were those of the answers."""
        return {"rows": "response", **data}

    def build(self, dims: AttentionDims, key: jax.Array) -> AvarLosses:
        """The mechanism of one layer."""
        return AvarLosses(self, dims.num_heads)


class AvarLosses(Mechanism):
    """Reads the attention of a layer and changes nothing of it."""

    def __init__(self, config: Avar, num_heads: int):
        self.config = config
        self.role = Role.QUESTION if config.rows == "prompt" else Role.RESPONSE
        self.num_heads = num_heads

    def key_groups(self, x: Features, remembered: None, info_k: TokenInfo) -> KeyGroups:
        """The picture, the system prompt, the rest."""
        return KeyGroups(key_group_of(info_k), COUNT)

    def losses(self, x: Features, parts: Parts, info_q: TokenInfo, info_k: TokenInfo) -> dict[str, Float[Array, ""]]:
        """Both losses, summed over documents and heads."""
        config, rows = self.config, info_q.role == self.role
        mass = sums_by_document(jnp.where(rows[..., None, None], parts.mass, 0.0), info_q.document)

        def log_mean(group: int) -> Float[Array, "B N H"]:
            pairs = self._pairs(info_q, info_k, group)
            log = jnp.log(_mean_attention(mass[:, :, group], pairs) + config.eps)
            return jnp.where(pairs[..., None] > 0, log, 0.0)

        return {
            "avar_enhance": -config.enhance * jnp.sum(log_mean(VISUAL)),
            "avar_suppress": config.suppress * jnp.sum(log_mean(SYSTEM)),
        }

    def loss_weights(self, info: TokenInfo) -> dict[str, Float[Array, ""]]:
        """How many documents have each loss, times heads."""

        def count(group: int) -> Float[Array, ""]:
            return jnp.sum(self._pairs(info, info, group) > 0, dtype=jnp.float32) * self.num_heads

        return {"avar_enhance": count(VISUAL), "avar_suppress": count(SYSTEM)}

    def _pairs(self, info_q: TokenInfo, info_k: TokenInfo, group: int) -> Float[Array, "B N"]:
        """Rows times keys of the key group, for each document; 0 for padding."""

        def count(which: Bool[Array, "B T"], info: TokenInfo) -> Float[Array, "B N"]:
            return sums_by_document((which & (info.document > 0)).astype(jnp.float32), info.document)

        return count(info_q.role == self.role, info_q) * count(key_group_of(info_k) == group, info_k)


def key_group_of(info: TokenInfo) -> Int[Array, "B S"]:
    """The picture, the system prompt, the rest."""
    prompt = (info.kind == Kind.TEXT) & (info.role == Role.SYSTEM)
    return jnp.where(info.kind == Kind.VISUAL, VISUAL, jnp.where(prompt, SYSTEM, 0))


def _mean_attention(mass: Float[Array, "B N H"], pairs: Float[Array, "B N"]) -> Float[Array, "B N H"]:
    """1 / pairs of the mass; 0 for documents that have no pairs."""
    some = pairs > 0
    return jnp.where(some[..., None], mass, 0.0) / jnp.where(some, pairs, 1.0)[..., None]
