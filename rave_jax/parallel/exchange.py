"""What devices exchange inside `jax.shard_map`: shards are gathered, and partial sums become shards again."""

from __future__ import annotations

import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

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
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    joined = [(math.prod(sizes),) if sizes else () for sizes in (before, after)]
    for axis in axes:
        ways = jax.lax.axis_size(axis)
        # The shards in front, as an axis of their own: they are sent as they lie. A TPU pads what is split along rows
        # or lanes to whole tiles, and sums an array whole on every device where the padding would be too much. For the
        # same reason the other axes, such as seven heads of 128, are joined.
        parts = jnp.moveaxis(x.reshape(*joined[0], ways, -1, *joined[1]), len(joined[0]), 0)
        if axis in partial:
            x = jax.lax.psum_scatter(parts, axis, scatter_dimension=0)
        else:
            x = jax.lax.dynamic_index_in_dim(parts, jax.lax.axis_index(axis), keepdims=False)
        x = x.reshape(*before, -1, *after)
    rest = tuple(axis for axis in partial if axis not in axes)
    # Last, when only the shard is left to be sent.
    return jax.lax.psum(x, rest) if rest else x
