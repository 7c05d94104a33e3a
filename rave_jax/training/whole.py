"""Refuses a mesh on which large parameters, and what is computed with them, stay whole because sizes do not divide."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, Mesh

from rave_jax.config import ConfigError
from rave_jax.parallel.sharding import Axes, mesh_axes, names_of, partition_spec

LARGE = 64 * 2**20
"""Bytes of a parameter, all its layers together, from which on it must be split."""
BY_DESIGN = ("kv_heads",)
"""Logical axes that may stay whole: devices with query heads of one kv head share it."""


def check_whole(
    shapes: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, Axes], mesh: Mesh | AbstractMesh, *, allow: bool
) -> None:
    """Refuse parameters that a mesh axis of their rule does not split.

    Args:
        shapes: of the parameters, by name.
        axes: their logical axes.
        mesh: where they lie.
        allow: refuse none.

    Raises:
        ConfigError: names the parameters, the sizes that do not divide, and what to do.
    """
    if allow:
        return
    found = [line for name, shape in shapes.items() for line in _whole(name, shape, axes[name], mesh)]
    if not found:
        return
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise ConfigError(
        f"the mesh does not split large parameters: {'; '.join(found[:3])}{more}. Each device along that axis would "
        "hold and compute all of it: choose a size of the axis that divides it, or allow it with mesh.allow_whole"
    )


def _whole(name: str, shape: jax.ShapeDtypeStruct, axes: Axes, mesh: Mesh | AbstractMesh) -> list[str]:
    if math.prod(shape.shape) * shape.dtype.itemsize < LARGE:
        return []
    spec = partition_spec(axes, shape.shape, mesh)
    lines = []
    for axis, size, entry in zip(axes, shape.shape, spec, strict=True):
        wanted = () if axis is None or axis in BY_DESIGN else mesh_axes(axis, mesh)
        left = [n for n in wanted if n not in names_of(entry)]
        if left:
            ways = " x ".join(f"{n} {mesh.shape[n]}" for n in left)
            lines.append(f"{ways} does not divide the {size} {axis} of {name}")
    return lines
