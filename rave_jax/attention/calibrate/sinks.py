"""The sink dimensions of a base model: where the hidden state of a first token is far larger than everywhere else.

Source: VAR, arXiv 2503.03321, which takes them from earlier findings on massive activations and keeps one fixed set for
each language model. It gives no procedure; ours: the mean of |x| / RMS over first tokens and middle layers, and of
that the largest dimensions. Middle layers are all but the first and the last quarter.

A first token sees itself alone, so rows of one token are enough to get its hidden states
(`Want.inputs` of a forward pass). `rave-jax calibrate var` does so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rave_jax.attention.var import Var
from rave_jax.config import check_fields, require
from rave_jax.typing import Array, Float, NpArray


@dataclass(frozen=True)
class VarSearch:
    """How many sink dimensions are looked for."""

    count: int = 2
    """Sink dimensions, those that stand out most; the known models have one or two."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.count >= 1, "count", self.count, "a number of dimensions, from 1")

    def config_of(self, hidden: Float[Array, "L *tokens D"]) -> Var:
        """The mechanism to put into a model's config."""
        return Var(sink_dimensions(hidden, self.count))


def sink_dimensions(hidden: Float[Array, "L *tokens D"], count: int) -> tuple[int, ...]:
    """The `count` dimensions that stand out most, the strongest first: `Var.dims`.

    Args:
        hidden: what enters each layer of the model, of first tokens of documents.
        count: how many are wanted; the known models have one or two.

    Raises:
        ConfigError: more than there are dimensions, or none.
    """
    strength = strengths(hidden)
    require(1 <= count <= len(strength), "count", count, f"a number from 1 to {len(strength)}")
    return tuple(int(n) for n in np.argsort(-strength, kind="stable")[:count])


def strengths(hidden: Float[Array, "L *tokens D"]) -> Float[NpArray, "D"]:
    """How much each dimension stands out: the mean of |x| / RMS; other arguments as in `sink_dimensions`."""
    x = np.asarray(hidden, np.float32)
    L, D = x.shape[0], x.shape[-1]
    middle = x[L // 4 : L - L // 4].reshape(-1, D)
    size = np.sqrt(np.mean(middle**2, axis=-1, keepdims=True) + 1e-6)
    return np.mean(np.abs(middle) / size, axis=0)
