"""Rows of the global batch: which this process owns, and how they become global arrays.

Rows belong to shards of the batch, not to processes: with tensor parallelism across processes several hold the
same rows and each must load them. Feeding by process index would exit 0 with replicas that quietly differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rave_jax.batch import Batch, Patches, TokenInfo
from rave_jax.config import require
from rave_jax.parallel.sharding import mesh_axes


def batch_axis() -> Any:
    """A Batch that holds, for each field, which of its axes counts rows."""

    def zeros(tree: Any) -> dict[str, Any]:
        return dict.fromkeys(tree._fields, 0)

    info, patches = TokenInfo(**zeros(TokenInfo)), Patches(**zeros(Patches))
    fields: dict[str, Any] = zeros(Batch) | {"positions": 1, "info": info, "patches": patches}
    return Batch(**fields)


def row_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many shards the mesh splits the rows."""
    return math.prod(mesh.shape[name] for name in mesh_axes("batch", mesh))


def batch_shardings(mesh: Mesh, rows: int) -> Any:
    """A Batch of NamedShardings: where each field of a batch of that many rows goes.

    Raises:
        ConfigError: the mesh does not divide the rows; padding or replicating them would change the loss.
    """
    ways = row_ways(mesh)
    require(rows % ways == 0, "data rows", rows, f"a multiple of {ways}, the shards into which the mesh splits rows")
    axes = mesh_axes("batch", mesh)

    def place(axis: int) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, axes))

    return jax.tree.map(place, batch_axis())


def owned_rows(mesh: Mesh, rows: int) -> list[range]:
    """The row ranges, ascending, that devices of this process hold."""
    sharding = batch_shardings(mesh, rows).tokens
    places = sharding.addressable_devices_indices_map((rows, 1)).values()
    spans = {place[0].indices(rows)[:2] for place in places if place is not None}
    return [range(*span) for span in sorted(spans)]


def global_batch(load: Callable[[range], Batch], mesh: Mesh, rows: int) -> Batch:
    """The batch as global arrays, of which this process loads the rows it owns.

    Args:
        load: gives numpy rows of the global batch; the same rows for the same range on every process.
        mesh: mesh of the run.
        rows: rows of the global batch.
    """
    parts = {span.start: load(span) for span in owned_rows(mesh, rows)}
    any_part = next(iter(parts.values()))

    def assemble(axis: int, sharding: NamedSharding, example: np.ndarray, *arrays: np.ndarray) -> jax.Array:
        by_start = dict(zip(parts, arrays, strict=True))
        shape = (*example.shape[:axis], rows, *example.shape[axis + 1 :])
        return jax.make_array_from_callback(
            shape, sharding, lambda place: by_start[(place or ())[axis].indices(rows)[0]], dtype=example.dtype
        )

    batch = jax.tree.map(assemble, batch_axis(), batch_shardings(mesh, rows), any_part, *parts.values())
    assert batch.tokens.shape[0] == rows, f"global batch has {batch.tokens.shape[0]} rows, expected {rows}"
    return batch
