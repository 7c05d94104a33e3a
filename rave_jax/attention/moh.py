"""Mixture of heads (MoH): every token uses the first heads and, of the others, those that a router chooses for it.

Source: arXiv 2410.11842 and its released code. With S shared heads (the first), E = H - S routed ones, K of them active
and x what enters the attention of a token, y = sum_h g_h O_h W_O^h where

    query_norm (the form that continues a trained language model; no parameters):
        r_h = |q_h|, of the query before RoPE      g_h = 1 on shared heads and on the K routed ones of largest r_h
    learned (the form that is trained from the start):
        p = softmax(W_r x) over routed heads       (a, b) = 2 softmax(W_0 x), or b = 1 where no head is shared
        g_h = b K p_h / sum of p over the K largest, 0 on the others      g_h = a S softmax(W_s x)_h on shared heads

Loss, with p of query_norm the softmax of r / std(r) over routed heads: E^2 mean_h(mean_i p_ih  mean_i chosen_ih).

Certain: both forms, from the code. The weight 0.01 of the loss could not be checked. With query_norm the paper trains
through a straight-through estimator that the code does not have: here a chosen gate is 1 with the gradient of p.

Our reading: x is the input of the layer divided by its root mean square, since W can take in the weight of the layer's
norm; W starts at zero, where all gates are 1 if all heads are active; of equal routed heads the first are chosen; and a
mean over tokens i is one over a document, so that a packed row equals its documents. All heads are computed: no time is
saved.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims, Features, Mechanism, Parts
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.masks import sums_by_document
from rave_jax.batch import TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.typing import Array, Float, Int

EPS = 1e-6
"""Added to mean squares."""


@dataclass(frozen=True)
class Moh(MechanismConfig):
    """Each token uses some heads, which a router chooses for it, beside those that all tokens use (MoH)."""

    router: Literal["query_norm", "learned"] = "query_norm"
    """How heads are chosen and weighed: by the size of their queries, without parameters and with gates of 0 and 1; or
    by learned scores, which also weigh the heads."""
    shared: float = 0.5
    """Share of the heads, the first, that every token uses; rounded down."""
    active: float = 0.25
    """Share of the heads that each token uses beside these; rounded down, but to one at least. With `shared` 1 in all:
    no head is dropped. If this is one head, a learned router gives it a weight of 1 and only `balance` trains which."""
    balance: float = 0.0
    """Weight of the loss that spreads tokens over the routed heads; 0 adds none."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("shared", "active"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share between 0 and 1")
        require(self.shared + self.active <= 1, "active", self.active, f"at most 1 - shared ({1 - self.shared:g})")
        require(0 <= self.balance <= 1e6, "balance", self.balance, "a number from 0 to 1e6")

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if it can drop and weigh no head.

        Raises:
            ConfigError: the shares leave no head active, or the learned router does not know the hidden size.
        """
        heads = dims.num_heads
        # Rounded down, as in the released code; but heads that are to be chosen are one at least.
        shared, active = _part(self.shared, heads), max(_part(self.active, heads), int(self.active > 0))
        if math.isclose(self.shared + self.active, 1):
            active = heads - shared
        require(shared + active > 0, "active", self.active, f"with shared at least one of {heads} heads")
        counts = Counts(heads, shared, active)
        if self.router == "query_norm":
            return QueryNormRouter(self, counts) if counts.active < counts.routed or self.balance else Mechanism()
        known = "'query_norm': the hidden size of the layer is not known"
        require(dims.hidden_size > 0, "router", self.router, known)
        return LearnedRouter(self, counts, dims.hidden_size)


def _part(share: float, heads: int) -> int:
    """A share of the heads, rounded down."""
    return math.floor(share * heads + 1e-9)  # 0.29 of 100 heads is 28.999... in floats


class Counts(NamedTuple):
    """How many heads there are, how many of them are shared, and how many of the routed ones are active."""

    heads: int
    shared: int
    active: int

    @property
    def routed(self) -> int:
        """E: heads that are not shared."""
        return self.heads - self.shared


class Routed(NamedTuple):
    """Scores of the routed heads as shares p, and which of them are chosen (0 or 1)."""

    share: Float[Array, "B T E"]
    chosen: Float[Array, "B T E"]


class HeadRouter(Mechanism):
    """What both routers share."""

    def __init__(self, config: Moh, counts: Counts):
        self.config = config
        self.counts = counts

    @abc.abstractmethod
    def routed(self, x: Features) -> Routed:
        """The choice of every token."""

    def losses(self, x: Features, parts: Parts, info_q: TokenInfo, info_k: TokenInfo) -> dict[str, Float[Array, ""]]:
        """The loss, summed over documents."""
        if not self.config.balance or not self.counts.routed:
            return {}
        share, chosen = (_means(value, info_q.document) for value in self.routed(x))
        unbalanced = self.counts.routed * jnp.sum(share * chosen)
        return {"moh_balance": self.config.balance * unbalanced}

    def loss_weights(self, info: TokenInfo) -> dict[str, Float[Array, ""]]:
        """How many documents there are."""
        if not self.config.balance or not self.counts.routed:
            return {}
        tokens = sums_by_document(jnp.ones(info.document.shape), info.document)[:, 1:]
        return {"moh_balance": jnp.sum(tokens > 0, dtype=jnp.float32)}


class QueryNormRouter(HeadRouter):
    """Heads whose queries are largest. Without parameters."""

    def routed(self, x: Features) -> Routed:
        """By the norms of queries, in standard deviations."""
        size = jnp.sqrt(jnp.sum(x.q0[:, :, self.counts.shared :].astype(jnp.float32) ** 2, axis=-1) + EPS**2)
        more = self.counts.routed > 1
        spread = jnp.sqrt(jnp.var(size, axis=-1, ddof=1, keepdims=True) + EPS**2) if more else 1.0
        # By the sizes: what is equal after division need not have been before.
        return Routed(jax.nn.softmax(size / spread, axis=-1), _largest(size, self.counts.active))

    def head_gate(self, x: Features, out: Float[Array, "B T H h"], info_q: TokenInfo) -> Float[Array, "B T H"]:
        """1 on what is chosen, with the gradient of p."""
        share, chosen = self.routed(x)
        gate = chosen + chosen * (share - jax.lax.stop_gradient(share))
        return jnp.concatenate([jnp.ones((*gate.shape[:2], self.counts.shared)), gate], axis=-1)


class LearnedRouter(HeadRouter):
    """Parameters: routed [E,D]; with shared heads also shared [S,D], of more than one, and both [2,D]."""

    def __init__(self, config: Moh, counts: Counts, width: int):
        super().__init__(config, counts)

        def scores(heads: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((heads, width)), axes=(None, "embed"))

        if counts.routed:
            self.of_routed = scores(counts.routed)
        if counts.shared > 1:
            self.of_shared = scores(counts.shared)
        if counts.shared and counts.routed:
            self.of_both = scores(2)

    def routed(self, x: Features) -> Routed:
        """By learned scores."""
        z = _product(x, self.of_routed)
        return Routed(jax.nn.softmax(z, axis=-1), _largest(z, self.counts.active))

    def head_gate(self, x: Features, out: Float[Array, "B T H h"], info_q: TokenInfo) -> Float[Array, "B T H"]:
        """Weights of shared and of chosen heads, each with a mean of 1 where all scores are equal."""
        shape, (_, shared, active) = x.q0.shape[:2], self.counts
        first = jnp.ones((*shape, shared))
        if shared > 1:
            first = _weights(_product(x, self.of_shared), 1.0, shared)
        if not self.counts.routed:
            return first
        chosen = self.routed(x).chosen
        rest = _weights(_product(x, self.of_routed), chosen, active)
        if shared:
            both = _weights(_product(x, self.of_both), 1.0, 2)
            first, rest = first * both[..., :1], rest * both[..., 1:]
        return jnp.concatenate([first, rest], axis=-1)


def _product(x: Features, weight: nnx.Param) -> Float[Array, "B T N"]:
    """Scores of tokens, from the layer's input over its root mean square, float32."""
    hidden = x.hidden.astype(jnp.float32)
    hidden = hidden * jax.lax.rsqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + EPS)
    return jnp.einsum("BTD,ND->BTN", hidden, weight[...].astype(jnp.float32))


def _weights(z: Float[Array, "B T N"], chosen: Float[Array, "B T N"] | float, count: int) -> Float[Array, "B T N"]:
    """`count` times the softmax over the chosen, of which there are so many, and 0 on the others. The division comes
    last, so that equal scores give exactly 1."""
    e = jnp.exp(z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))) * chosen
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e * count / jnp.where(total > 0, total, 1.0)


def _largest(z: Float[Array, "B T E"], count: int) -> Float[Array, "B T E"]:
    """1 on the `count` largest, the first of equal ones, and 0 on the others. It has no gradient."""
    if count == z.shape[-1]:
        return jnp.ones_like(z)
    top: Int[Array, "B T K"] = jax.lax.top_k(jax.lax.stop_gradient(z), count)[1]
    return jnp.sum(jax.nn.one_hot(top, z.shape[-1], dtype=jnp.float32), axis=-2)


def _means(values: Float[Array, "B T E"], document: Int[Array, "B T"]) -> Float[Array, "B N E"]:
    """Means over the tokens of each document; 0 where there are none. Padding is no document."""
    tokens = sums_by_document(jnp.ones(document.shape), document)
    return (sums_by_document(values, document) / jnp.maximum(tokens, 1.0)[..., None])[:, 1:]
