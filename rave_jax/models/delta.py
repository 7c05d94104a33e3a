"""The mixer of a layer with the gated delta rule: projections, causal convolution, the rule, a gated norm.

Source: Gated DeltaNet (arXiv 2412.06464) as the released hybrids of gated delta layers and attention have it: queries
and keys of length 1, decay g = -exp(decay_log) softplus(decay projection + decay_bias), strength b = sigmoid(strength
projection), and RMSNorm(out) * silu(gate projection) before the output projection.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.batch import TokenInfo
from rave_jax.families.config import DeltaConfig
from rave_jax.models.delta_rule import DeltaTokens, Memory, chunked, recurrent
from rave_jax.models.initial import normal
from rave_jax.models.layers import Linear, keep_inputs
from rave_jax.parallel.sharding import Axes, shard
from rave_jax.typing import Array, Bool, Float, Int

UNIT_EPS = 1e-6
"""Added to the squared length of queries and keys before they are divided by it."""
DECAY_RATES = (0.01, 16.0)
"""Rates exp(decay_log) at the start: uniform in between."""


class InTurn(NamedTuple):
    """How the rule goes through tokens: document by document, in the order of their offsets.

    Fields:
        offset: of each token in turn.
        real: is it a token, not padding?
        order: where the token that is n-th in turn stands; None where they stand in turn.
        back: when the turn of each token comes; None as `order`.
    """

    offset: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    order: Int[Array, "B T"] | None
    back: Int[Array, "B T"] | None

    def sorted(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Tokens in turn."""
        return x if self.order is None else jnp.take_along_axis(x, self.order[..., None], axis=1)

    def unsorted(self, x: Float[Array, "B T H h"]) -> Float[Array, "B T H h"]:
        """Tokens in turn back where they stand."""
        return x if self.back is None else jnp.take_along_axis(x, self.back[..., None, None], axis=1)


def in_turn(info: TokenInfo, by_region: bool) -> InTurn:
    """The turns of tokens.

    Args:
        info: codes of the tokens.
        by_region: may tokens of a picture stand in another order than that of their offsets?
    """
    real = info.document > 0
    if not by_region or real.shape[1] == 1:
        return InTurn(info.offset, real, None, None)
    order = jnp.lexsort((info.offset, jnp.where(real, info.document, jnp.iinfo(jnp.int32).max)), axis=-1)
    offset, real = (jnp.take_along_axis(code, order, axis=1) for code in (info.offset, real))
    return InTurn(offset, real, order, jnp.argsort(order, axis=-1))


STATE_AXES: tuple[Axes, ...] = ((None, "channels"), ("heads", None, None, None))
"""Logical axes of the arrays of `DeltaState`, behind the rows."""


class DeltaState(NamedTuple):
    """What a layer keeps of the tokens of rows, C channels of queries, keys and values.

    Fields:
        tail: what entered the convolution with the last tokens, as many as it reaches back.
        memory: the matrix of every value head, float32.
    """

    tail: Float[Array, "B W C"]
    memory: Memory


class Delta(nnx.Module):
    """The mixer of one layer. `decay_log`, `decay_bias` and the norm are float32 whatever the other parameters are."""

    def __init__(self, config: DeltaConfig, width: int, *, eps: float, dtype: jnp.dtype, key: jax.Array):
        H, v = config.value_heads, config.value_dim
        keys = jax.random.split(key, 7)
        linear = functools.partial(Linear, bias=False, dtype=dtype)
        self.qkv = linear((config.channels,), (width,), ("channels", "embed"), key=keys[0])
        self.gate = linear((H, v), (width,), ("heads", "head_dim", "embed"), key=keys[1])
        self.strength = linear((H,), (width,), ("heads", "embed"), key=keys[2])
        self.decay = linear((H,), (width,), ("heads", "embed"), key=keys[3])
        self.output = linear((width,), (H, v), ("embed", "heads", "head_dim"), key=keys[4])
        taps = normal(keys[5], (config.channels, config.conv_width), config.conv_width**-0.5, dtype)
        self.conv = nnx.Param(taps, axes=("channels", None))
        low, high = DECAY_RATES
        uniform = jax.scipy.special.ndtr(normal(keys[6], (H,), 1.0, jnp.dtype(jnp.float32)))
        self.decay_log = nnx.Param(jnp.log(low + (high - low) * uniform), axes=("heads",))
        self.decay_bias = nnx.Param(jnp.ones((H,), jnp.float32), axes=("heads",))
        self.norm = GatedNorm(v, eps=eps)
        self.config = config

    def empty_state(self, rows: int, dtype: jnp.dtype) -> DeltaState:
        """What is kept of rows without tokens; `dtype` is the compute type."""
        c = self.config
        groups = (c.key_heads, c.value_heads // c.key_heads)
        tail = jnp.zeros((rows, c.conv_width - 1, c.channels), dtype)
        return DeltaState(tail, jnp.zeros((rows, *groups, c.key_dim, c.value_dim), jnp.float32))

    def __call__(
        self, x: Float[Array, "B T D"], turn: InTurn, state: DeltaState
    ) -> tuple[Float[Array, "B T H v"], DeltaState]:
        """What the value heads give, gated and before the output projection, and the state behind the tokens.

        Args:
            x: tokens, where they stand.
            turn: how to go through them.
            state: of what came before. A document's first token (offset 0) finds nothing, whatever the state holds.
        """
        x = turn.sorted(x)
        entering = shard(self.qkv(x), "batch", "length", "channels")
        tokens = self._tokens(x, causal_conv(entering, self.conv[...], turn.offset, state.tail), turn)
        rule = recurrent if x.shape[1] == 1 else chunked
        out, memory = rule(tokens, state.memory)
        state = DeltaState(next_tail(entering, turn.real, state.tail), memory)
        heads = shard(out.reshape(*out.shape[:2], -1, out.shape[-1]), "batch", "length", "heads", None)
        return turn.unsorted(self.norm(heads, self.gate(x))), state

    def _tokens(self, x: Float[Array, "B T D"], mixed: Float[Array, "B T C"], turn: InTurn) -> DeltaTokens:
        """What the tokens say, float32."""
        c, (B, T) = self.config, turn.real.shape
        K, G = c.key_heads, c.value_heads // c.key_heads
        q, k, v = jnp.split(mixed.astype(jnp.float32), [K * c.key_dim, 2 * K * c.key_dim], axis=-1)
        q, k = (_unit(y.reshape(B, T, K, c.key_dim)) for y in (q, k))
        wide = self.decay(x).astype(jnp.float32) + self.decay_bias[...].astype(jnp.float32)
        decay = -jnp.exp(self.decay_log[...].astype(jnp.float32)) * jax.nn.softplus(wide)
        strength = jax.nn.sigmoid(self.strength(x)).astype(jnp.float32)
        real = turn.real[..., None]

        def of_heads(y: Array, *rest: int) -> Array:
            return shard(y.reshape(B, T, K, G, *rest), "batch", "length", "heads", *[None] * (1 + len(rest)))

        return DeltaTokens(
            q=shard(q * c.key_dim**-0.5, "batch", "length", "heads", None),
            k=shard(k, "batch", "length", "heads", None),
            v=of_heads(v, c.value_dim),
            decay=of_heads(jnp.where(real, decay, 0)),
            strength=of_heads(jnp.where(real, strength, 0)),
            begins=turn.real & (turn.offset == 0),
        )


class GatedNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight * silu(gate) over the last axis, in float32."""

    def __init__(self, width: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32), axes=(None,))
        self.eps = eps

    def __call__(self, x: Array, gate: Array) -> Array:
        """The same shape as x, in the gate's number type."""
        return keep_inputs(functools.partial(_gated_norm, eps=self.eps))(x, gate, self.weight[...])


def _gated_norm(x: Array, gate: Array, weight: Array, *, eps: float) -> Array:
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (x * scale * weight.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)


def _unit(x: Float[Array, "B T K h"]) -> Float[Array, "B T K h"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + UNIT_EPS)


def causal_conv(
    x: Float[Array, "B T C"], taps: Float[Array, "C N"], offset: Int[Array, "B T"], tail: Float[Array, "B W C"]
) -> Float[Array, "B T C"]:
    """silu of each channel's sum over a token and the N - 1 tokens of its document before it, the last tap its own.

    Args:
        x: tokens in turn.
        taps: of each channel.
        offset: of the tokens: how many stand before them in their document.
        tail: the W = N - 1 tokens before the first.
    """
    T, N = x.shape[1], taps.shape[1]
    joined = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    total = jnp.zeros(x.shape, jnp.float32)
    for back in range(N):
        before = joined[:, N - 1 - back : N - 1 - back + T].astype(jnp.float32)
        seen = (offset >= back)[..., None]
        total = total + jnp.where(seen, before * taps[:, N - 1 - back].astype(jnp.float32), 0)
    return jax.nn.silu(total).astype(x.dtype)


def next_tail(x: Float[Array, "B T C"], real: Bool[Array, "B T"], tail: Float[Array, "B W C"]) -> Float[Array, "B W C"]:
    """The last W tokens of each row, those before it among them; padding stands on the right and does not count."""
    W = tail.shape[1]
    count = jnp.sum(real, axis=1, dtype=jnp.int32)
    joined = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    return jnp.take_along_axis(joined, (count[:, None] + jnp.arange(W, dtype=jnp.int32))[..., None], axis=1)
