"""Which layers share one set of mechanisms: the stack as layer runs, each one scan."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from rave_jax.attention.base import AttentionDims, Mechanism, overrides
from rave_jax.attention.checks import check_hooks, check_owners, name_of
from rave_jax.attention.declared import LayeredConfig
from rave_jax.attention.functions import terms_of
from rave_jax.attention.given import check_given, failing
from rave_jax.attention.prompted import Prompted
from rave_jax.config import ConfigError
from rave_jax.kernels.attention import Term
from rave_jax.parallel.sharding import RULES


class LayerRunPlan(NamedTuple):
    """Layers start .. stop - 1 (global numbers) use exactly these mechanisms."""

    start: int
    stop: int
    mechanisms: tuple[LayeredConfig, ...]


def plan_layer_runs(
    configs: Sequence[LayeredConfig],
    num_layers: int,
    join: bool = True,
    kinds: Sequence[Hashable] | None = None,
    attending: Collection[int] | None = None,
) -> tuple[LayerRunPlan, ...]:
    """Runs of consecutive layers with equal mechanisms, in order, covering every layer. A layer behind which tokens
    leave is a run of its own.

    Args:
        configs: mechanisms and the layers each is in.
        num_layers: of the whole stack.
        join: without it, every layer is a run of its own.
        kinds: of each layer; layers of different kinds stand in different runs. None: all are of one kind.
        attending: layers that attend, in order; a config for "all" layers means these. None: every layer does.

    Raises:
        ConfigError: a config names a layer that the model does not have, one that does not attend, or one twice, or
            tokens leave after the last layer.
    """
    every = range(num_layers) if attending is None else attending
    for config in configs:
        named = () if isinstance(config.layers, str) else config.layers
        repeated = sorted({n for n in named if named.count(n) > 1})
        if repeated:
            raise ConfigError(f"{config.called}.layers names {repeated} more than once, expected each layer once")
        for field, numbers in {"layers": named, **{name: (n,) for name, n in config.other_layers.items()}}.items():
            _check_layers(f"{config.called}.{field}", numbers, num_layers, every)
    chosen = [config.layers_of(tuple(every)) for config in configs]
    used = [tuple(c for c, own in zip(configs, chosen, strict=True) if n in own) for n in range(num_layers)]
    late = [config for config in used[-1] if config.drops]
    if late:
        raise ConfigError(
            f"{late[0].called}.layers names {num_layers - 1}, the last layer, and no layer is behind it that tokens "
            f"could be spared; expected numbers from 0 to {num_layers - 2}"
        )
    plans: list[LayerRunPlan] = []
    for n, mechanisms in enumerate(used):
        alike = n > 0 and plans[-1].mechanisms == mechanisms and (kinds is None or kinds[n - 1] == kinds[n])
        alike = alike and not any(config.drops for config in mechanisms)
        if join and alike:
            plans[-1] = plans[-1]._replace(stop=n + 1)
        else:
            plans.append(LayerRunPlan(n, n + 1, mechanisms))
    return tuple(plans)


def _check_layers(field: str, named: Sequence[int], num_layers: int, attending: Collection[int]) -> None:
    """Refuse layers that the model does not have, or that do not attend."""
    missing = [n for n in named if not 0 <= n < num_layers]
    if missing:
        raise ConfigError(f"{field} names {missing}, expected numbers from 0 to {num_layers - 1}")
    elsewhere = sorted({*named} - {*attending})
    if elsewhere:
        raise ConfigError(
            f"{field} names {elsewhere}, layers without attention, which a mechanism changes; "
            f"expected some of the layers that attend, {[*attending]}, or 'all' of them"
        )


def build_mechanisms(configs: Sequence[LayeredConfig], dims: AttentionDims, key: jax.Array) -> nnx.List:
    """The mechanisms of one layer, in the order of their configs.

    Raises:
        ConfigError: two of them cannot share a layer (`check_owners`), `build` of a config failed or gave no
            mechanism, or a hook fails or gives what the layer cannot take (`check_given`, `terms_of`).
    """
    keys = jax.random.split(key, max(len(configs), 1))
    mechanisms = [_built(config, dims, k) for config, k in zip(configs, keys, strict=False)]
    for mechanism in mechanisms:
        check_given(mechanism, dims)
    check_owners(mechanisms, [_terms(mechanism, dims) for mechanism in mechanisms])
    check_hooks(mechanisms)
    return nnx.List(mechanisms)


def _terms(mechanism: Mechanism, dims: AttentionDims) -> tuple[Term, ...]:
    name = name_of(mechanism)
    with failing(f"{name}: a term that the hook `score` gave cannot be used"):
        try:
            return terms_of(mechanism, dims)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error


def _built(config: LayeredConfig, dims: AttentionDims, key: jax.Array) -> Mechanism:
    with failing(f"{config.called}: its `build` fails"):
        mechanism = config.build(dims, key)
    if not isinstance(mechanism, Mechanism):
        found = type(mechanism).__name__
        raise ConfigError(f"build of {config.called} returned an object of class {found}, expected a Mechanism")
    mechanism.declared = config
    for hook in ("positions", "factor", "route", "tokens"):
        if overrides(mechanism, hook) and hook not in mechanism.OWNS:
            raise ConfigError(
                f"{config.called}: {type(mechanism).__name__} overrides the hook {hook!r}, which only one mechanism of "
                f"a layer may; say so in the class: OWNS = ({hook!r},)"
            )
    if "hi" in mechanism.OWNS and not config.looks_ahead:
        raise ConfigError(
            f"{config.called}: {type(mechanism).__name__} owns 'hi', so tokens see later ones, and generation would "
            "read prompts in pieces; let the config's `looks_ahead` be True"
        )
    if overrides(mechanism, "tokens") != config.drops:
        raise ConfigError(
            f"{config.called}: {type(mechanism).__name__} {'lets' if config.drops is False else 'does not let'} tokens "
            f"leave (the hook 'tokens'), and `stays` of {config.called} says otherwise; expected both or neither"
        )
    if isinstance(mechanism, Prompted) != config.of_prompt:
        is_, says = ("is no", "says") if config.of_prompt else ("is a", "does not say")
        raise ConfigError(
            f"{config.called}: {type(mechanism).__name__} {is_} Prompted, whose numbers are found for each prompt, and "
            f"{config.called} {says} `of_prompt`; expected both or neither"
        )
    _check_parameters(config, mechanism)
    return mechanism


def _check_parameters(config: LayeredConfig, mechanism: Mechanism) -> None:
    """Every parameter names its logical axes, by which it is sharded."""
    leaves = jax.tree_util.tree_flatten_with_path(mechanism, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    for path, leaf in leaves:
        axes = leaf.get_metadata().get("axes") if isinstance(leaf, nnx.Param) else ()
        if isinstance(leaf, nnx.Param) and not (
            isinstance(axes, tuple) and len(axes) == leaf.ndim and all(name is None or name in RULES for name in axes)
        ):
            raise ConfigError(
                f"{config.called}: the parameter {jax.tree_util.keystr(path)} of shape {leaf.shape} has axes {axes!r}, "
                f"expected nnx.Param(value, axes=(...)) with a name for each dimension: None or {', '.join(RULES)}"
            )
