"""Which way a step goes from its gradients, before decay and learning rate: AdamW, Adafactor or Muon."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from rave_jax.config import ConfigError, check_fields, require
from rave_jax.parallel.sharding import Axes
from rave_jax.training import rounding
from rave_jax.training.rounding import Quantised
from rave_jax.typing import Array, Float, Int

Moment = Literal["float32", "bfloat16", "8-bit"]
Parts = tuple[optax.GradientTransformation, ...]
"""Transformations in order, of a dict of float32 gradients by parameter name."""


@dataclass(frozen=True)
class AdamW:
    """Adam whose weight decay does not go through its moments (arXiv 1412.6980, 1711.05101)."""

    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the squared gradients."""
    first_moment: Moment = "float32"
    """Number type in which the mean of gradients is kept; 8-bit is block-wise (arXiv 2110.02861)."""
    second_moment: Moment = "float32"
    """Number type in which the mean of squared gradients is kept."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "from 0 to below 1")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "from 0 to below 1")
        require(0 < self.epsilon <= 1, "epsilon", self.epsilon, "above 0, at most 1")

    def rule(self, name: str, axes: Axes) -> AdamW:
        """What moves this parameter."""
        return self

    def parts(self, axes: Mapping[str, Axes]) -> Parts:
        """The direction. Args: logical axes of each parameter."""
        if self.first_moment == "8-bit" or self.second_moment != "float32":
            return (_scale_by_adam(self, axes),)
        return (optax.scale_by_adam(self.beta1, self.beta2, self.epsilon, mu_dtype=self.first_moment),)


@dataclass(frozen=True)
class Adafactor:
    """Squared gradients of a matrix as sums over its rows and columns, and no first moment (arXiv 1804.04235)."""

    decay: float = 0.8
    """The mean of squared gradients of step t decays by 1 - t^-decay."""
    epsilon: float = 1e-30
    """Added to squared gradients."""
    clip: float | None = 1.0
    """Largest root mean square of a parameter's update, of each layer; null does not clip."""
    by_size: bool = False
    """Is the update multiplied by the root mean square of its parameter? Then the learning rate is relative."""
    smallest: int = 128
    """Parameters whose two largest axes have fewer entries keep a mean for each number."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 < self.decay <= 1, "decay", self.decay, "above 0, at most 1")
        require(0 < self.epsilon <= 1, "epsilon", self.epsilon, "above 0, at most 1")
        require(self.clip is None or self.clip > 0, "clip", self.clip, "above 0, or null")
        require(2 <= self.smallest < 2**31, "smallest", self.smallest, "at least 2")

    def rule(self, name: str, axes: Axes) -> Adafactor:
        """What moves this parameter."""
        return self

    def parts(self, axes: Mapping[str, Axes]) -> Parts:
        """The direction. Args: logical axes of each parameter."""
        scale = optax.scale_by_factored_rms(
            decay_rate=self.decay, epsilon=self.epsilon, min_dim_size_to_factor=self.smallest
        )
        return scale, _relative(self, axes)


@dataclass(frozen=True)
class Muon:
    """The momentum of matrices, made orthogonal; AdamW for other parameters (arXiv 2502.16982)."""

    pattern: str = r"\.layers\.(attention|mlp|delta|extra_mlp)\."
    """Regular expression, searched in the canonical path: matrices that it finds are moved by Muon."""
    beta: float = 0.95
    """Decay of the momentum (Nesterov's)."""
    iterations: int = 5
    """Steps of the Newton-Schulz iteration."""
    rms: float = 0.2
    """Root mean square of an update at learning rate 1: about that of AdamW, so that both take the same rate."""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """Number type in which the momentum is kept."""
    rest: AdamW = field(default_factory=AdamW)
    """Moves what Muon does not: embeddings, the head, norms, biases, mechanisms."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 <= self.beta < 1, "beta", self.beta, "from 0 to below 1")
        require(1 <= self.iterations <= 100, "iterations", self.iterations, "from 1 to 100")
        require(0 < self.rms <= 100, "rms", self.rms, "above 0, at most 100")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"pattern is {self.pattern!r}, expected a regular expression: {error}") from error

    def rule(self, name: str, axes: Axes) -> Muon | AdamW:
        """What moves this parameter."""
        return self if is_matrix(axes) and re.search(self.pattern, name) else self.rest

    def parts(self, axes: Mapping[str, Axes]) -> Parts:
        """The direction. Args: logical axes of each matrix."""

        def dimensions(params: Any) -> Any:
            return {
                name: x if isinstance(x, optax.MaskedNode) else MuonDimensionNumbers(*matrix_sides(axes[name]))
                for name, x in params.items()
            }

        muon = scale_by_muon(
            beta=self.beta,
            ns_steps=self.iterations,
            mu_dtype=self.first_moment,
            weight_dimension_numbers=dimensions,
        )
        return muon, _same_size(self, axes)


Algorithm = AdamW | Adafactor | Muon


class Sides(NamedTuple):
    """Numbers of the axes of a matrix that are summed over, and of those of its result."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def is_matrix(axes: Axes) -> bool:
    """Is a parameter with these logical axes a matrix, or several?"""
    return bool(matrix_sides(axes).outputs)


def matrix_sides(axes: Axes) -> Sides:
    """Which axes of a weight are the columns and rows of a matrix [out, in]; none where it is no matrix.

    Layers and experts are matrices of their own, and so are the three of a joint projection. Heads are not: all heads
    of a projection are one matrix, as checkpoints have them.
    """
    first = sum(name in ("layers", "experts") for name in axes[:2])
    rest = list(range(first, len(axes)))
    if len(rest) > 3 and axes[first] is None:
        rest = rest[1:]
    if len(rest) < 2 or ("channels" in axes and "embed" not in axes):
        return Sides((), ())
    cut = 1 if axes[rest[0]] in ("embed", "rank") else len(rest) - 1
    return Sides(tuple(rest[cut:]), tuple(rest[:cut]))


def _size(x: Array, axes: Axes) -> Float[Array, "..."]:
    """Root mean square of a parameter's numbers, of each layer."""
    inner = tuple(n for n, name in enumerate(axes) if name != "layers")
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=inner, keepdims=True))


def _each(change: Callable[[str, Array, Array], Array]) -> optax.GradientTransformation:
    """`change(name, update, parameter)` of every parameter; no state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return {
            name: x if isinstance(x, optax.MaskedNode) else change(name, x, params[name]) for name, x in updates.items()
        }, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _relative(config: Adafactor, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    """Clipped to a size, and multiplied by the parameter's; sections 6 and 8 of the paper."""

    def change(name: str, update: Array, param: Array) -> Array:
        if config.clip is not None:
            update = update / jnp.maximum(1.0, _size(update, axes[name]) / config.clip)
        return update * jnp.maximum(_size(param, axes[name]), 1e-3) if config.by_size else update

    return _each(change)


def _same_size(config: Muon, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    """An orthogonal [out, in] has a root mean square of max(out, in)^-1/2, which is made `rms`."""

    def change(name: str, update: Array, param: Array) -> Array:
        longest = max(math.prod(param.shape[n] for n in side) for side in matrix_sides(axes[name]))
        return update * (config.rms * longest**0.5)

    return _each(change)


def _scale_by_adam(config: AdamW, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, whose moments are kept in the config's number types and computed in float32."""
    kinds = ((config.first_moment, True), (config.second_moment, False))

    def init(params: Any) -> Any:
        moments: Any = ({name: _empty(x, axes[name], *kind) for name, x in _given(params).items()} for kind in kinds)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), *moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count: Any = optax.safe_increment(state.count)
        means: Any
        squares: Any
        means, squares, out = {}, {}, dict(updates)
        for name, grad in _given(updates).items():
            mean = config.beta1 * _wide(state.mu[name]) + (1 - config.beta1) * grad
            square = config.beta2 * _wide(state.nu[name]) + (1 - config.beta2) * jnp.square(grad)
            root = jnp.sqrt(square / (1 - config.beta2**count)) + config.epsilon
            out[name] = mean / (1 - config.beta1**count) / root
            means[name] = _kept(mean, state.mu[name], axes[name], count, signed=True)
            squares[name] = _kept(square, state.nu[name], axes[name], count, signed=False)
        return out, optax.ScaleByAdamState(count, means, squares)

    return optax.GradientTransformation(init, update)


def _given(params: Any) -> dict[str, Array]:
    return {name: x for name, x in params.items() if not isinstance(x, optax.MaskedNode)}


def _empty(x: Array, axes: Axes, kind: Moment, signed: bool) -> Array | Quantised:
    blocks = rounding.blocks_of(axes, x.shape) if kind == "8-bit" else None
    if blocks is not None:
        return rounding.nothing(x.shape, blocks, signed=signed)
    return jnp.zeros(x.shape, jnp.bfloat16 if kind == "bfloat16" else jnp.float32)


def _wide(moment: Array | Quantised) -> Array:
    return rounding.restored(moment) if isinstance(moment, Quantised) else moment.astype(jnp.float32)


def _kept(x: Array, before: Array | Quantised, axes: Axes, count: Int[Array, ""], *, signed: bool) -> Array | Quantised:
    """The number type of `before`."""
    if isinstance(before, Quantised):
        blocks = rounding.blocks_of(axes, x.shape)
        assert blocks is not None
        return rounding.quantised(x, blocks, count, signed=signed)
    return rounding.to_bfloat16(x, count) if before.dtype == jnp.bfloat16 else x
