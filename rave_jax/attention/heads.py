"""After everything else: the outputs of heads are scaled, before the output projection."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Mechanism, overrides
from rave_jax.batch import TokenInfo
from rave_jax.config import require
from rave_jax.typing import Array, Float


def head_gates(
    mechanisms: Sequence[Mechanism], x: Features, out: Float[Array, "B T H h"], info_q: TokenInfo
) -> Float[Array, "#B #T H"] | None:
    """What heads are multiplied by: the product of what each `head_gate` says; None where nobody says anything."""
    gating = [mechanism for mechanism in mechanisms if overrides(mechanism, "head_gate")]
    said = [gate for gate in (mechanism.head_gate(x, out, info_q) for mechanism in gating) if gate is not None]
    return functools.reduce(operator.mul, said) if said else None


def scaled(out: Float[Array, "B T H h"], gates: Float[Array, "#B #T H"] | None) -> Float[Array, "B T H h"]:
    """Heads times their gates, in their type; a gate of 1 changes no bit."""
    return out if gates is None else (out.astype(jnp.float32) * gates[..., None]).astype(out.dtype)


class ScaledHeads(Mechanism):
    """Heads times numbers that are known when the model is built. Without parameters."""

    def __init__(self, scales: tuple[float, ...]):
        self.scales = scales

    def head_gate(self, x: Features, out: Float[Array, "B T H h"], info_q: TokenInfo) -> Float[Array, "1 1 H"]:
        """The numbers, for every token."""
        return jnp.array(self.scales, jnp.float32)[None, None]


def check_heads(heads: tuple[int, ...], dims: AttentionDims) -> None:
    """Refuse numbers of heads that the layer does not have.

    Raises:
        ConfigError: names the field `heads`.
    """
    known = all(0 <= n < dims.num_heads for n in heads)
    require(known, "heads", heads, f"numbers from 0 to {dims.num_heads - 1}")
