"""The gradient of a linear's weight on a mesh: each device sums over its own rows, and the sums go onto the shards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from rave_jax.parallel.exchange import MeshAxes, summed_onto_shard
from rave_jax.parallel.sharding import Axes, current_mesh, names_of, partition_spec
from rave_jax.typing import Array

Product = Callable[[Array, Array], Array]
"""(x [B,T,*in], weight [*out,*in]) -> [B,T,*out], linear in both."""


def on_mesh(product: Product, x: Array, weight: Array, axes: Axes, num_in: int) -> Array:
    """`product(x, weight)`. On a mesh the weight's gradient is summed onto the weight's shards.

    Left to itself the TPU compiler sums most weights' gradients whole on every device, and cuts out the shard then.

    Args:
        product: linear in both sides.
        x: [B,T,*in]; what has other axes in front is left to the compiler.
        weight: [*out,*in].
        axes: logical axes of the weight.
        num_in: how many axes are summed.
    """
    split = Split.of(x, weight, axes) if x.ndim == 2 + num_in else None
    return product(x, weight) if split is None else _summed(product, x, weight, split)


class Split(NamedTuple):
    """How the mesh splits a product."""

    mesh: Mesh | AbstractMesh
    weight: PartitionSpec
    x: PartitionSpec
    y: PartitionSpec
    rows: MeshAxes
    """Mesh axes that split rows and their tokens, over which the gradient is summed."""

    @classmethod
    def of(cls, x: Array, weight: Array, axes: Axes) -> Split | None:
        """Over the current mesh; None where it splits no rows."""
        mesh, num_in = current_mesh(), x.ndim - 2
        if mesh is None:
            return None
        of_tokens = partition_spec(("batch", "length"), x.shape[:2], mesh)
        rows = tuple(name for entry in of_tokens for name in names_of(entry))
        of_weight = partition_spec(axes, weight.shape, mesh)
        # Mesh axes that split rows cannot split the width of the same array too.
        others = [tuple(name for name in names_of(entry) if name not in rows) or None for entry in of_weight]
        of_x, of_y = (PartitionSpec(*of_tokens, *part) for part in (others[-num_in:], others[:-num_in]))
        return cls(mesh, of_weight, of_x, of_y, rows) if rows else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _summed(product: Product, x: Array, weight: Array, split: Split) -> Array:
    return product(x, weight)


def _forward(product: Product, x: Any, weight: Any, split: Split) -> tuple[Array, tuple[Array | None, Array]]:
    # A weight beside an adapter is not differentiated: nothing is kept for it.
    return product(x.value, weight.value), (x.value if weight.perturbed else None, weight.value)


def _backward(
    product: Product, split: Split, kept: tuple[Array | None, Array], gradient: Array
) -> tuple[Array, Array | None]:
    x, weight = kept
    num_in = len(split.x) - 2
    like = jnp.zeros((*gradient.shape[:2], *weight.shape[-num_in:]), gradient.dtype)
    (of_x,) = jax.vjp(lambda x: product(x, weight), like)[1](gradient)
    if x is None:
        return of_x, None

    def on_device(gradient: Array, x: Array) -> Array:
        summed = (((0, 1), (0, 1)), ((), ()))
        total = jax.lax.dot_general(gradient, x, summed, preferred_element_type=gradient.dtype)
        shards = [(dim, names_of(entry)) for dim, entry in enumerate(split.weight)]
        shards = [(dim, names) for dim, names in shards if set(names) & set(split.rows)]
        # No mesh axis splits two dimensions, and those of rows are in the rule of one.
        dim, names = shards[0] if shards else (0, ())
        return summed_onto_shard(total, dim, names, split.rows)

    of_weight = jax.shard_map(
        on_device, mesh=split.mesh, in_specs=(split.y, split.x), out_specs=split.weight, check_vma=False
    )
    return of_x, of_weight(gradient, x).astype(weight.dtype)


_summed.defvjp(_forward, _backward, symbolic_zeros=True)
