"""Sharding rules as data: logical axis names of arrays to mesh axes.

Parameters carry their logical axes as `nnx.Param(..., axes=("mlp", "embed"))`; activations name theirs in
`shard(x, "batch", "length", None)`. `RULES` is the one table that says where each name goes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping
from contextvars import ContextVar

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # rows, and the tokens of a row
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    # tokens of the residual stream, between the matmuls of a layer
    "residual": ("context", "tensor"),
    "entries": None,
    # parameters and the activations between them
    "embed": ("fsdp", "expert", "context"),
    "expert_embed": ("fsdp", "context"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "channels": "tensor",
    "experts": ("expert", "tensor"),
    "head_dim": None,
    "rank": None,
    "patch": None,
    "layers": None,
}

_current_mesh: ContextVar[Mesh | AbstractMesh | None] = ContextVar("rave_jax_mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh | AbstractMesh) -> Generator[None]:
    """Make `shard` constrain to this mesh. Enter it around tracing (jit's first call) and running alike.

    An abstract mesh, which has shape and no devices, serves tracing and lowering alone.
    """
    token = _current_mesh.set(mesh)
    try:
        abstract = isinstance(mesh, AbstractMesh)
        with jax.sharding.use_abstract_mesh(mesh) if abstract else jax.set_mesh(mesh):
            yield
    finally:
        _current_mesh.reset(token)


def partition_spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where an array with these logical axes goes on the mesh.

    Where a rule has several mesh axes, the last ones are left out until the rest divides the size. A size that no
    mesh axis divides is kept whole (4 kv heads on 8 tensor ways, say); the parameter table printed at the start of a
    run shows it.

    Raises:
        KeyError: a logical axis that RULES does not know.
    """
    entries = []
    for name, size in zip(axes, shape, strict=True):
        names = () if name is None else mesh_axes(name, mesh)
        while size % math.prod(mesh.shape[n] for n in names):
            names = names[:-1]
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec or of RULES."""
    return (entry,) if isinstance(entry, str) else entry or ()


def mesh_axes(name: str, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Axes of the mesh that split a logical axis: those of its rule that are larger than 1.

    Raises:
        KeyError: RULES does not know the logical axis.
    """
    return tuple(n for n in names_of(RULES[name]) if mesh.shape[n] > 1)


def named_sharding(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """`partition_spec` as a NamedSharding."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its place on the current mesh; the identity without one."""
    mesh = _current_mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(axes, x.shape, mesh))


def current_mesh() -> Mesh | AbstractMesh | None:
    """The mesh of `use_mesh`, or None."""
    return _current_mesh.get()


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
