"""LoRA: where adapters go. The adapter itself is `layers.Adapter`, or `experts.ExpertAdapter` of a layer's experts;
what has a matrix adds it to its output."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.config import ConfigError
from rave_jax.models.config import Lora
from rave_jax.models.embedding import Embedding
from rave_jax.models.experts import ExpertWeights, Router
from rave_jax.models.layers import Linear, TiedHead

Adapted = Linear | ExpertWeights | Router | Embedding | TiedHead
"""What takes an adapter."""

PROJECTORS = ("vision.merger.", "vision.deep_mergers.", "vision.projector.")
"""Where linears stand that lead from the tower to the decoder."""


def is_projector(path: str) -> bool:
    """Is a parameter at this path part of a linear between tower and decoder?"""
    return path.startswith(PROJECTORS)


def projectors(tower: nnx.Module) -> dict[str, Adapted]:
    """Every linear of a tower that stands behind its layers, by path."""
    found: dict[str, Adapted] = {}
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


def linears(module: nnx.Module, prefix: str) -> dict[str, Adapted]:
    """Every linear below `module`, those of experts and routers among them, by dotted path with `prefix` in front."""
    found: dict[str, Adapted] = {}
    for name, child in vars(module).items():
        if isinstance(child, Linear | ExpertWeights | Router):
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


def adapt(known: Mapping[str, Adapted], lora: Lora | None, dtype: jnp.dtype, key: jax.Array) -> None:
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
            linear.adapt(lora.rank, lora.alpha / lora.rank, dtype, jax.random.fold_in(key, zlib.crc32(path.encode())))


def check_targets(lora: Lora | None, known: Iterable[str]) -> None:
    """Refuse targets that name no linear.

    Args:
        lora: the adapters.
        known: paths of linears.

    Raises:
        ConfigError: names the unknown targets, and all that are known.
    """
    known, targets = list(dict.fromkeys(known)), () if lora is None else lora.targets
    unknown = [target for target in targets if not any(re.fullmatch(target, path) for path in known)]
    if unknown:
        raise ConfigError(f"lora.targets names {', '.join(unknown)}, expected some of {', '.join(known)}")
