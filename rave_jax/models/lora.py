"""LoRA: where adapters go. The adapter itself is `layers.Adapter`; a linear adds it to its output."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.config import ConfigError
from rave_jax.models.config import Lora
from rave_jax.models.experts import Experts
from rave_jax.models.layers import Adapter, Linear

PROJECTORS = ("vision.merger.", "vision.deep_mergers.", "vision.projector.")
"""Where linears stand that lead from the tower to the decoder."""


def is_projector(path: str) -> bool:
    """Is a parameter at this path part of a linear between tower and decoder?"""
    return path.startswith(PROJECTORS)


def projectors(tower: nnx.Module) -> dict[str, Linear]:
    """Every linear of a tower that stands behind its layers, by path."""
    found: dict[str, Linear] = {}
    for name, child in vars(tower).items():
        if not is_projector(f"vision.{name}."):
            continue
        if isinstance(child, Linear):
            found[f"vision.{name}"] = child
            continue
        parts = [(f"{n}.", one) for n, one in enumerate(child)] if isinstance(child, nnx.List) else [("", child)]
        for number, part in parts:
            found |= linears(part, f"vision.{name}.{number}")
    return found


def linears(module: nnx.Module, prefix: str) -> dict[str, Linear]:
    """Every linear below `module`, by dotted path with `prefix` in front."""
    found: dict[str, Linear] = {}
    for name, child in vars(module).items():
        if isinstance(child, Linear):
            found[prefix + name] = child
        elif isinstance(child, nnx.Module):
            found |= linears(child, f"{prefix}{name}.")
    return found


def attach(layer: nnx.Module, prefix: str, lora: Lora | None, dtype: jnp.dtype, key: jax.Array) -> None:
    """Give each target of `lora` below `layer` its adapter, as `adapt` does. Runs while one layer is being made.

    Args:
        layer: a layer of the decoder or of the tower.
        prefix: `decoder.` or `vision.`, what targets call it.
        lora, dtype, key: as those of `adapt`.
    """
    adapt(linears(layer, prefix), lora, dtype, key)


def adapt(known: Mapping[str, Linear], lora: Lora | None, dtype: jnp.dtype, key: jax.Array) -> None:
    """Give each linear whose whole path a target matches its adapter.

    Args:
        known: linears by path.
        lora: None attaches nothing.
        dtype: of the adapter's parameters.
        key: folded with the path, so that one adapter's start does not depend on the others.
    """
    if lora is None:
        return
    for path, linear in known.items():
        if any(re.fullmatch(target, path) for target in lora.targets):
            linear.adapter = Adapter(
                linear.out_shape,
                linear.in_shape,
                linear.weight.get_metadata()["axes"],
                rank=lora.rank,
                scale=lora.alpha / lora.rank,
                dtype=dtype,
                key=jax.random.fold_in(key, zlib.crc32(path.encode())),
            )


def experts(module: nnx.Module, prefix: str) -> list[str]:
    """Dotted paths, with `prefix` in front, of what belongs to experts below `module`."""
    found: list[str] = []
    for name, child in vars(module).items():
        if isinstance(child, Experts):
            found += [f"{prefix}{name}.{part}" for part, one in vars(child).items() if isinstance(one, nnx.Module)]
        elif isinstance(child, nnx.Module):
            found += experts(child, f"{prefix}{name}.")
    return found


def check_targets(lora: Lora | None, known: Iterable[str], of_experts: Iterable[str] = ()) -> None:
    """Refuse targets that name no linear.

    Args:
        lora: the adapters.
        known: paths of linears.
        of_experts: paths of what belongs to experts.

    Raises:
        ConfigError: names the unknown targets, those of experts, and all that are known.
    """
    of_experts = set(of_experts)
    known = [path for path in dict.fromkeys(known) if path not in of_experts]

    def found(target: str, paths: Iterable[str]) -> bool:
        return any(re.fullmatch(target, path) for path in paths)

    targets = () if lora is None else lora.targets
    refused = [target for target in targets if found(target, of_experts) and not found(target, known)]
    if refused:
        raise ConfigError(
            f"lora.targets names {', '.join(refused)}, which are parts of experts and take no adapter; expected some "
            f"of {', '.join(known)}"
        )
    unknown = [target for target in targets if not found(target, known)]
    if unknown:
        raise ConfigError(f"lora.targets names {', '.join(unknown)}, expected some of {', '.join(known)}")
