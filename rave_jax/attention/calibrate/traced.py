"""ZeroTuning's factors as an array, so that one compiled program serves every head and every gamma of a search.

A built model has its gammas as constants: each other table would be another program. Here the mechanism is put into a
copy of the decoder while a program is traced, with the table as an argument of that program. Nothing is kept: the
decoder that is given, its parameters and its checkpoints do not change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims
from rave_jax.attention.zero_tuning import FirstTokenBias
from rave_jax.config import ConfigError
from rave_jax.typing import Array, Float


class Run(Protocol):
    """Layers start .. stop - 1 (global numbers) as one scan."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def layers(self) -> Any:
        """`Layers`."""
        ...


class Stack(Protocol):
    """What is needed of a decoder."""

    @property
    def layer_runs(self) -> Iterable[Run]:
        """All layers, in order."""
        ...

    @property
    def attention_dims(self) -> AttentionDims: ...


class FirstTokenTraced(FirstTokenBias):
    """log(gamma) as a bias of the first token, where the logs are an array: [L,H] in a stack, [H] in its scan."""

    def __init__(self, log: Float[Array, "*L H"]):
        self.given = nnx.data(log)

    @property
    def log(self) -> Float[Array, "H"]:
        """Logs of the factors."""
        return self.given


def with_gammas[S: Stack](decoder: S, gammas: Float[Array, "L H"]) -> S:
    """The decoder with the weight of every document's first token multiplied, on top of what it does already.

    To be called inside the program that uses the result.

    Args:
        decoder: with all its layers; it is left as it is.
        gammas: a factor above 0 for each layer and head; 1 changes nothing.

    Raises:
        ConfigError: the table is not of this decoder's layers and heads.
    """
    copy = jax.tree.map(lambda leaf: leaf, decoder)
    runs = list(copy.layer_runs)
    wanted = (runs[-1].stop, copy.attention_dims.num_heads)
    if gammas.shape != wanted:
        raise ConfigError(f"gammas is a table of shape {gammas.shape}, expected (layers, heads) of {wanted}")
    logs = jnp.log(gammas.astype(jnp.float32))
    for run in runs:
        run.layers.mechanisms.append(FirstTokenTraced(logs[run.start : run.stop]))
    return copy
