"""What devices exchange inside `jax.shard_map`: shards are gathered, and partial sums become shards again."""

from __future__ import annotations

from collections.abc import Collection

import jax

from rave_jax.typing import Array

MeshAxes = tuple[str, ...]
"""Names of mesh axes, the outermost first, as an entry of a PartitionSpec has them."""


def gathered(x: Array, dim: int, axes: MeshAxes) -> Array:
    """The whole of dimension `dim`, of which these mesh axes split off x."""
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def summed_onto_shard(x: Array, dim: int, axes: MeshAxes, partial: Collection[str]) -> Array:
    """This device's shard of a sum.

    Args:
        x: the sum over what this device has, whole in `dim`.
        dim: the dimension that is split.
        axes: mesh axes that split it.
        partial: mesh axes along which devices hold different parts of the sum. Along others x is the same.
    """
    for axis in axes:
        if axis in partial:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
        else:
            size = x.shape[dim] // jax.lax.axis_size(axis)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, axis=dim)
    rest = tuple(axis for axis in partial if axis not in axes)
    # Last, when only the shard is left to be sent.
    return jax.lax.psum(x, rest) if rest else x
