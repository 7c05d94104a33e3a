"""Settings of a mechanism as an array, so that one compiled program serves every head and every number of a search.

A built model has its gammas and scales as constants: each other table would be another program. Here the mechanism is
put into a copy of the decoder while a program is traced, with the table as an argument of that program. Nothing is
kept: the decoder that is given, its parameters and its checkpoints do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims, Features, Mechanism
from rave_jax.attention.heads import ScaledHeads
from rave_jax.attention.zero_tuning import FirstTokenBias
from rave_jax.batch import TokenInfo
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
    wanted = (list(decoder.layer_runs)[-1].stop, decoder.attention_dims.num_heads)
    if gammas.shape != wanted:
        raise ConfigError(f"gammas is a table of shape {gammas.shape}, expected (layers, heads) of {wanted}")
    logs = jnp.log(gammas.astype(jnp.float32))
    return with_mechanism(decoder, lambda run: FirstTokenTraced(logs[run.start : run.stop]))


class ScaledHeadsTraced(ScaledHeads):
    """Heads times numbers, where these are an array: [L,B,H] in a stack, [B,H] in its scan; B is rows, or 1."""

    def __init__(self, scales: Float[Array, "*L B H"]):
        self.given = nnx.data(scales)

    def head_gate(self, x: Features, out: Float[Array, "B T H h"], info_q: TokenInfo) -> Float[Array, "#B 1 H"]:
        """The numbers, for every token of a row."""
        return self.given[:, None]


def with_scales[S: Stack](decoder: S, scales: Float[Array, "L B H"]) -> S:
    """The decoder with the outputs of heads multiplied, for all rows (B is 1) or for each: as `with_gammas`."""
    return with_mechanism(decoder, lambda run: ScaledHeadsTraced(scales[run.start : run.stop]))


def with_mechanism[S: Stack](decoder: S, make: Callable[[Run], Mechanism]) -> S:
    """The decoder with one more mechanism in each layer. To be called inside the program that uses the result.

    Args:
        decoder: all of whose layers attend; it is left as it is.
        make: the mechanism of a layer run, every array with the layer axis in front.
    """
    copy = jax.tree.map(lambda leaf: leaf, decoder)
    for run in copy.layer_runs:
        run.layers.mechanisms.append(make(run))
    return copy
