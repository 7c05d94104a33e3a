"""ZeroTuning: the weight of a document's first token is multiplied, per head, and the others' shares follow.

Source: arXiv 2505.11739, its formula, in every row, when a prompt is read and when an answer is written:

    a'_0 = gamma a_0 / D    a'_j = a_j / D    D = 1 + (gamma - 1) a_0

which is log(gamma) added to the score of key 0. gamma > 1 flattens what is left to the other keys, gamma < 1 sharpens
it, and 1 asks for nothing. The paper finds heads and gamma by a search; this is what such a search returns.

Our reading: in a packed row each document has a first token of its own; a query that does not see its first token, as
under a sliding window, is left as it is; the factor acts on the scores as all other mechanisms leave them.

The routes are one map, exact in real numbers: a bias of the key; a column more in q and k (log(gamma) is then rounded
to their number type); the first token as a key group of its own; or a correction of what the kernel gives, from its
log-sum-exp. The last takes the first token out of a rounded output, so its rounding grows by up to 1 / gamma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Channels, Features, KeyFactor, Mechanism, Parts, Score
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.batch import TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import KeyGroups
from rave_jax.typing import Array, Bool, Float, Int

LEAST, MOST = 1e-30, 1e30
"""Gammas that float32 holds, and their logs."""


@dataclass(frozen=True)
class ZeroTuning(MechanismConfig):
    """The first token of every document gets `gamma` times its weight before the row is normalised again."""

    gamma: float | tuple[float, ...] = 1.0
    """Factor of the first token's weight: one number, or one for each head in `heads`. For other numbers in other
    layers, give the model several of these configs, each with its `layers`."""
    heads: Literal["all"] | tuple[int, ...] = "all"
    """Query heads that are changed, by number, or all."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""
    route: Literal["key_bias", "channel", "merge", "after"] = "key_bias"
    """How it is computed, always the same numbers: key_bias adds to the score in the kernel; channel through one more
    column of q and k; merge runs the kernel for the first token and the rest apart; after corrects its output, which is
    cheapest, too coarse where gamma is far below 1, and so for gammas from 0.001 to 1000 alone."""

    def __post_init__(self) -> None:
        check_fields(self)
        given = self.gamma if isinstance(self.gamma, tuple) else (self.gamma,)
        known = all(LEAST <= gamma <= MOST for gamma in given)
        require(known, "gamma", self.gamma, f"numbers above 0, from {LEAST:g} to {MOST:g}")
        near = self.route != "after" or all(1e-3 <= gamma <= 1e3 for gamma in given)
        require(near, "gamma", self.gamma, "numbers from 0.001 to 1000 with route 'after'; others need another route")
        fits = self.heads == "all" or len(given) == len(self.heads) or not isinstance(self.gamma, tuple)
        require(fits, "gamma", self.gamma, f"one number, or one for each of heads {self.heads}")
        once = self.heads == "all" or len(set(self.heads)) == len(self.heads)
        require(once, "heads", self.heads, "each head once")

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if every gamma is 1.

        Raises:
            ConfigError: a head that the layer does not have, or not one gamma for each of its heads.
        """
        heads = tuple(range(dims.num_heads)) if self.heads == "all" else self.heads
        known = all(0 <= n < dims.num_heads for n in heads)
        require(known, "heads", self.heads, f"numbers from 0 to {dims.num_heads - 1}")
        given = self.gamma if isinstance(self.gamma, tuple) else (self.gamma,) * len(heads)
        require(len(given) == len(heads), "gamma", self.gamma, f"one number, or one for each of {len(heads)} heads")
        of_head = dict(zip(heads, given, strict=True))
        logs = tuple(math.log(of_head.get(n, 1.0)) for n in range(dims.num_heads))
        return ROUTES[self.route](logs) if any(logs) else Mechanism()


class FirstToken(Mechanism):
    """What the routes share: the log of every head's factor, and where first tokens are. Without parameters."""

    def __init__(self, logs: tuple[float, ...]):
        self.logs = logs

    @property
    def log(self) -> Float[Array, "H"]:
        """Logs of the factors."""
        return jnp.array(self.logs, jnp.float32)


class FirstTokenBias(FirstToken):
    """log(gamma) as a bias of the first token."""

    def score(self, x: Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """log(gamma) on first tokens, 0 on others."""
        return Score(key_bias=jnp.where(first(info_k)[..., None], self.log, 0.0))


class FirstTokenChannel(FirstToken):
    """log(gamma) as the product of one more column of q and k."""

    def score(self, x: Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """log(gamma) in every query, 1 in first tokens."""
        B, T, H, _ = x.q.shape
        q = jnp.broadcast_to(self.log[:, None], (B, T, H, 1))
        k = jnp.broadcast_to(first(info_k)[..., None, None], (*info_k.offset.shape, x.k.shape[2], 1))
        return Score(channels=Channels(q, k.astype(jnp.float32)))


class FirstTokenMerge(FirstToken):
    """The first token as a key group of its own, whose weight is multiplied."""

    def key_groups(self, x: Features, remembered: None, info_k: TokenInfo) -> KeyGroups:
        """First tokens are group 1."""
        return KeyGroups(first(info_k).astype(jnp.int32), 2)

    def merge(self, x: Features, parts: Parts, info_q: TokenInfo, info_k: TokenInfo) -> Float[Array, "B T N H"]:
        """log(gamma) for first tokens."""
        weights = jnp.stack([jnp.zeros_like(self.log), self.log])
        return jnp.broadcast_to(weights, parts.groups.shape)


class FirstTokenAfter(FirstToken):
    """The first token's weight multiplied in what the kernel gave."""

    OWNS = ("factor",)

    def factor(self, x: Features, info_q: TokenInfo, info_k: TokenInfo) -> KeyFactor:
        """The first token of each query's document."""
        return KeyFactor(first_of(info_q.document, info_k), self.log)


ROUTES: dict[str, type[FirstToken]] = {
    "key_bias": FirstTokenBias,
    "channel": FirstTokenChannel,
    "merge": FirstTokenMerge,
    "after": FirstTokenAfter,
}


def first(info: TokenInfo) -> Bool[Array, "B S"]:
    """Which tokens are the first of their document; an empty entry of a cache is none."""
    return (info.offset == 0) & (info.document > 0)


def first_of(document: Int[Array, "B T"], info_k: TokenInfo) -> Int[Array, "B T"]:
    """Where among the keys the first token of each query's document stands; 0 for padding."""
    S = info_k.offset.shape[1]
    index = jnp.where(first(info_k), jnp.arange(S, dtype=jnp.int32), 0)
    starts = jax.vmap(lambda at, number: jax.ops.segment_max(at, number, num_segments=S + 1))(index, info_k.document)
    return jnp.take_along_axis(starts, document, axis=1, mode="clip")
