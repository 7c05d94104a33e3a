"""Optimizer, learning-rate schedule and parameter groups.

Parameters are named by their canonical path (models/parameters.py). A group is a regular expression over those
names; the first group that matches owns the parameter, and what no group matches is trained as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from rave_jax.config import TAG, ConfigError, check_ranges, require
from rave_jax.parallel.sharding import Axes
from rave_jax.training.algorithms import AdamW, Algorithm, Muon
from rave_jax.training.averages import Ema

Schedule = Callable[[jax.Array | int], jax.Array]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate, a decay and whether they are trained."""

    name: str = ""
    """Name in the parameter table."""
    pattern: str = ""
    """Regular expression, searched in the canonical parameter path, such as `^vision\\.` or `mechanisms`."""
    learning_rate: float = 1.0
    """Multiplier of the optimizer's learning rate."""
    weight_decay: float | None = None
    """Weight decay of this group; null takes the optimizer's."""
    frozen: bool = False
    """Never trained: no gradient, no optimizer state."""
    freeze_after: int | None = None
    """Trained until this many steps are done, then kept as it is; null trains to the end."""

    def __post_init__(self) -> None:
        require(bool(self.name), "name", self.name, "a name")
        check_ranges(self, weight_decay=(0, 1e6), freeze_after=(0, 2**31 - 1), learning_rate=(0, 1e9))
        require(self.learning_rate > 0 or self.frozen, "learning_rate", self.learning_rate, "above 0, or frozen")
        require(not (self.frozen and self.freeze_after), "freeze_after", self.freeze_after, "null in a frozen group")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"pattern is {self.pattern!r}, expected a regular expression: {error}") from error


REST = ParameterGroup(name="rest", pattern="")
UNUSED = ParameterGroup(name="unused", frozen=True)
"""Parameters that nothing is computed with (`models.parameters.mark_unused`)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """An algorithm with clipping, a warm-up and a decay."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup: int = 0
    """Steps over which the learning rate rises to its peak; the first step already has a share of it."""
    decay: Literal["cosine", "linear", "none"] = "cosine"
    """How the learning rate falls from its peak to the last step."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    algorithm: Algorithm = field(default_factory=AdamW)
    """Which way a step goes from its gradients: AdamW, Adafactor or Muon."""
    weight_decay: float = 0.0
    """Weight decay of matrices, times the learning rate; vectors (norms, biases) do not decay."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient of all trained parameters together; null does not clip."""
    master_copies: bool = False
    """Keep trained parameters in float32 between steps, and compute with copies in `model.param_dtype` bfloat16?
    Without them a step is added in bfloat16, where a change of less than 0.4 % is lost."""
    ema: Ema | None = None
    """A moving average of the trained parameters, or None."""
    offload: bool = False
    """Keep optimizer state and average in the hosts' memory between steps? Each step moves them to the devices and
    back, and its update holds all of them at once. No number of a run depends on it."""
    accumulation: int = 1
    """Micro-batches of one step; the result is that of the whole batch, but for the loss of routers of experts, which
    is of each micro-batch."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameter groups; the first whose pattern matches owns a parameter."""

    def __post_init__(self) -> None:
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "above 0")
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "at least 0")
        require(self.warmup >= 0, "warmup", self.warmup, "at least 0 steps")
        require(0 <= self.final_learning_rate <= 1, "final_learning_rate", self.final_learning_rate, "from 0 to 1")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0, or null")
        check_ranges(self, accumulation=(1, 2**20))
        names = [group.name for group in self.groups]
        require(
            len(set(names)) == len(names) and REST.name not in names, "groups", names, "different names, not 'rest'"
        )

    @classmethod
    def from_older(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON of one as it is written, from one that has the fields of AdamW beside its own."""
        if "algorithm" in data:
            return data
        older = ("beta1", "beta2", "epsilon", "first_moment")
        adam = {name: data[name] for name in older if name in data}
        rest = {name: value for name, value in data.items() if name not in adam}
        return rest | {"algorithm": {TAG: AdamW.__name__, **adam}}


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Learning rate of step 0, 1, ... of a run of that many steps."""
    require(config.warmup < steps, "optimizer.warmup", config.warmup, f"fewer than the run's {steps} steps")

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(config.warmup, 1), 1.0)
        done = jnp.clip((step - config.warmup) / (steps - config.warmup), 0.0, 1.0)
        fall = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)), "linear": 1 - done, "none": jnp.ones(())}[config.decay]
        return config.learning_rate * rise * (config.final_learning_rate + (1 - config.final_learning_rate) * fall)

    return rate


def assign_groups(names: Iterable[str], config: OptimizerConfig) -> dict[str, ParameterGroup]:
    """The group of each parameter.

    Raises:
        ConfigError: a group that matches no parameter, or one whose parameters earlier groups took.
    """
    names = list(names)
    groups = {name: next((g for g in config.groups if re.search(g.pattern, name)), REST) for name in names}
    for i, group in enumerate(config.groups):
        if group not in groups.values():
            taken = any(re.search(group.pattern, name) for name in names)
            why = "earlier groups take all that it matches" if taken else "it matches no parameter"
            examples = ", ".join(sorted(names)[:: max(1, len(names) // 5)][:5])
            raise ConfigError(
                f"optimizer.groups.{i} ({group.name}): pattern is {group.pattern!r}, but {why}; "
                f"parameters are {examples}, ..."
            )
    return groups


def in_float32(*parts: optax.GradientTransformation) -> optax.GradientTransformation:
    """The parts in order, on float32 copies of gradients and parameters, whatever their types.

    In bfloat16 a mean of squared gradients stands still: what a step adds to it is less than its last bit.
    """
    inner = optax.chain(*parts)

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return inner.init(wide(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(wide(updates), state, wide(params))

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimizerConfig, steps: int, groups: Mapping[str, ParameterGroup], axes: Mapping[str, Axes]
) -> optax.GradientTransformation:
    """The optimizer of a dict of trained parameters by name.

    Args:
        config: rates and decays.
        steps: steps of the whole run, for the schedule.
        groups: group of each trained parameter.
        axes: logical axes of each trained parameter; those with one or none beside layers do not decay.
    """
    schedule = learning_rate_schedule(config, steps)

    def matrices(params: Any) -> dict[str, bool]:
        return {name: sum(axis != "layers" for axis in axes[name]) >= 2 for name in params}

    def of_group(group: ParameterGroup, rule: Algorithm) -> optax.GradientTransformation:
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay

        def rate(count: Any) -> jax.Array:
            return group.learning_rate * schedule(count)

        return in_float32(
            *rule.parts(axes),
            optax.add_decayed_weights(decay, mask=matrices),
            optax.scale_by_learning_rate(rate),
        )

    rules = {name: config.algorithm.rule(name, axes[name]) for name in groups}
    labels = {name: _label(group, rules[name]) for name, group in groups.items()}
    transforms: dict[Any, optax.GradientTransformation] = {
        labels[name]: of_group(group, rules[name]) for name, group in groups.items()
    }
    by_group = optax.multi_transform(transforms, labels)
    return by_group if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), by_group)


def _label(group: ParameterGroup, rule: Algorithm) -> str:
    """What optimizer state calls the parameters of a group that one rule moves."""
    return f"{group.name} by Muon" if isinstance(rule, Muon) else group.name
