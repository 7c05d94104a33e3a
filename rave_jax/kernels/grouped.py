"""Matrix products of groups of rows, each group with a matrix of its own (grouped matmul).

No group has a fixed size, no row is dropped, and none is computed for a group that is not its own. On TPUs it is
`jax.lax.ragged_dot_general`, which the compiler turns into a grouped kernel in all three products of training.
Elsewhere that operation multiplies every row with every matrix, so there it is a loop over blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rave_jax.typing import Array, Float, Int

MOST_ROWS = 128
"""Rows of a block at most; a block is shorter where all rows together are few."""


def grouped_product(
    x: Float[Array, "N I"], weight: Float[Array, "E O I"], sizes: Int[Array, "E"]
) -> Float[Array, "N O"]:
    """y[n, o] = sum over i of weight[e, o, i] x[n, i] for the group e of row n, in x's number type.

    Args:
        x: rows, those of group 0 first, then those of group 1 and so on. Rows behind all groups may hold anything
            finite; what they become is undefined, and may be no number.
        weight: a matrix for each of E groups, in x's number type.
        sizes: rows of each group, in all at most N.
    """
    return jax.lax.platform_dependent(x, weight, sizes, tpu=_ragged, default=_in_blocks)


def _ragged(x: Array, weight: Array, sizes: Array) -> Array:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return jax.lax.ragged_dot_general(x, weight, sizes, numbers, preferred_element_type=x.dtype)


@jax.custom_vjp
def _in_blocks(x: Array, weight: Array, sizes: Array) -> Array:
    return _blocks_product(x, weight, sizes)


def _forward(x: Array, weight: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return _in_blocks(x, weight, sizes), (x, weight, sizes)


def _backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, None]:
    x, weight, sizes = kept
    dx = _blocks_product(gradient, weight, sizes, transposed=True)
    return dx, _blocks_weight_gradient(gradient, x, weight, sizes), None


_in_blocks.defvjp(_forward, _backward)


def _block_rows(rows: int) -> int:
    return min(MOST_ROWS, max(rows, 1))


def _blocks_product(x: Array, weight: Array, sizes: Array, transposed: bool = False) -> Array:
    """The product of each block of rows of one group, in turn; `transposed`: the sum is over o."""
    rows, size = x.shape[0], _block_rows(x.shape[0])
    sums, width = ("no,oi->ni", weight.shape[2]) if transposed else ("ni,oi->no", weight.shape[1])
    padded = jnp.pad(x, ((0, size), (0, 0)))
    count, place = _blocks(sizes, size)

    def step(n: Array, y: Array) -> Array:
        group, start, valid = place(n)
        block = jax.lax.dynamic_slice_in_dim(padded, start, size)
        made = jnp.einsum(sums, block, weight[group], preferred_element_type=x.dtype)
        # Rows behind the group's last belong to the next group, which writes them after this one, or to none.
        old = jax.lax.dynamic_slice_in_dim(y, start, size)
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(valid[:, None], made, old), start, axis=0)

    return jax.lax.fori_loop(0, count, step, jnp.zeros((rows + size, width), x.dtype))[:rows]


def _blocks_weight_gradient(gradient: Array, x: Array, weight: Array, sizes: Array) -> Array:
    size = _block_rows(x.shape[0])
    rows, gradients = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, gradient))
    count, place = _blocks(sizes, size)

    def step(n: Array, total: Array) -> Array:
        group, start, valid = place(n)
        block = jax.lax.dynamic_slice_in_dim(rows, start, size)
        of_block = jnp.where(valid[:, None], jax.lax.dynamic_slice_in_dim(gradients, start, size), 0)
        made = jnp.einsum("no,ni->oi", of_block, block, preferred_element_type=jnp.float32)
        return total.at[group].add(made)

    return jax.lax.fori_loop(0, count, step, jnp.zeros(weight.shape, jnp.float32)).astype(weight.dtype)


def _blocks(sizes: Int[Array, "E"], size: int) -> tuple[Int[Array, ""], Callable[[Array], tuple[Array, Array, Array]]]:
    """How many blocks there are, and of block n its group, its first row, and which of its rows are of the group."""
    ends = jnp.cumsum(sizes)
    last = jnp.cumsum(-(-sizes // size))

    def place(n: Array) -> tuple[Array, Array, Array]:
        group = jnp.searchsorted(last, n, side="right")
        before = n - (last[group] - -(-sizes[group] // size))
        start = ends[group] - sizes[group] + before * size
        return group, start, start + jnp.arange(size) < ends[group]

    return last[-1], place
