"""Which layers share one set of mechanisms: the stack as layer runs, each one scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import jax
from flax import nnx

from rave_jax.attention.base import AttentionDims, Mechanism, check_owners
from rave_jax.config import ConfigError

Layers = Literal["all"] | tuple[int, ...]


class LayeredConfig(Protocol):
    """What every mechanism's config has."""

    @property
    def layers(self) -> Layers:
        """Global numbers of the decoder layers that use it, or "all"."""
        ...

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism for one layer."""
        ...


class LayerRunPlan(NamedTuple):
    """Layers start .. stop - 1 (global numbers) use exactly these mechanisms."""

    start: int
    stop: int
    mechanisms: tuple[LayeredConfig, ...]


def plan_layer_runs(configs: Sequence[LayeredConfig], num_layers: int, join: bool = True) -> tuple[LayerRunPlan, ...]:
    """Runs of consecutive layers with equal mechanisms, in order, covering every layer.

    Args:
        configs: mechanisms and the layers each is in.
        num_layers: of the whole stack.
        join: without it, every layer is a run of its own.

    Raises:
        ConfigError: a config names a layer that the model does not have.
    """
    for config in configs:
        missing = [] if config.layers == "all" else [n for n in config.layers if not 0 <= n < num_layers]
        if missing:
            raise ConfigError(
                f"{type(config).__name__}.layers names {missing}, expected numbers from 0 to {num_layers - 1}"
            )
    used = [tuple(c for c in configs if c.layers == "all" or n in c.layers) for n in range(num_layers)]
    plans: list[LayerRunPlan] = []
    for n, mechanisms in enumerate(used):
        if join and plans and plans[-1].mechanisms == mechanisms:
            plans[-1] = plans[-1]._replace(stop=n + 1)
        else:
            plans.append(LayerRunPlan(n, n + 1, mechanisms))
    return tuple(plans)


def build_mechanisms(configs: Sequence[LayeredConfig], dims: AttentionDims, key: jax.Array) -> nnx.List:
    """The mechanisms of one layer, in the order of their configs.

    Raises:
        ConfigError: two of them own one thing, or one needs plain what another owns.
    """
    keys = jax.random.split(key, max(len(configs), 1))
    mechanisms = [config.build(dims, k) for config, k in zip(configs, keys, strict=False)]
    check_owners(mechanisms)
    return nnx.List(mechanisms)
