"""Counts the bytes that a Pallas grid moves between HBM and the chip, from its blocks and index maps.

A `CostEstimate` says what its author declares. What Pallas does on a TPU is simple enough to count: it walks the grid,
last dimension quickest, and copies a block in when its index differs from that of the step before, or out when the
index is about to change. What a kernel copies by itself, and operands without blocks, are not counted here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Operand:
    """An input or output of a Pallas call.

    Args:
        name: for the answer and for errors.
        shape: of the whole array.
        itemsize: bytes of a number.
        block: shape of a block; None for a dimension of which a block holds one place and the kernel sees none.
        index_map: (a grid index per dimension, then the prefetched scalars) -> a block index per dimension. It is
            called once with whole columns of grid indices, int32 [steps], so operators, `jnp` and indexing are fine
            in it, `if` and `min` are not.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    block: tuple[int | None, ...]
    index_map: Callable[..., Sequence[Any]]

    @classmethod
    def of(cls, name: str, spec: Any, array: Any) -> Self:
        """The operand that a `pl.BlockSpec` with blocks describes.

        Args:
            name: for the answer and for errors.
            spec: the block spec.
            array: has shape and dtype.
        """
        block = tuple(size if isinstance(size, int) else None for size in spec.block_shape)
        return cls(name, tuple(array.shape), np.dtype(array.dtype).itemsize, block, spec.index_map)


def copied_bytes(grid: Sequence[int], operands: Sequence[Operand], scalars: Sequence[Any] = ()) -> dict[str, int]:
    """Operand -> bytes copied, for one core. A block that hangs over the edge counts with what lies inside.

    Args:
        grid: steps per dimension.
        operands: names differ.
        scalars: the concrete prefetched arrays, as the index maps take them.

    Raises:
        ValueError: a block or an index has not as many dimensions as its array, or two operands have one name.
        IndexError: a block lies outside its array.
    """
    if len({operand.name for operand in operands}) != len(operands):
        raise ValueError("two operands have one name")
    steps = math.prod(grid)
    places = [column.astype(np.int32) for column in np.unravel_index(np.arange(steps), tuple(grid))]
    held = [np.asarray(scalar) for scalar in scalars]
    return {operand.name: _bytes(operand, places, held) for operand in operands}


def _bytes(operand: Operand, places: list[np.ndarray], scalars: list[np.ndarray]) -> int:
    index = operand.index_map(*places, *scalars)
    if not len(index) == len(operand.block) == len(operand.shape):
        raise ValueError(
            f"{operand.name}: an index of {len(index)} for a block of {len(operand.block)} dimensions "
            f"of an array of {len(operand.shape)}"
        )
    steps = len(places[0])
    changes = np.zeros(steps, bool)
    changes[0] = True
    sizes = np.full(steps, operand.itemsize, np.int64)
    for axis, (at, block, length) in enumerate(zip(index, operand.block, operand.shape, strict=True)):
        column, size = np.broadcast_to(np.asarray(at), (steps,)).astype(np.int64), block or 1
        outside = (column < 0) | (column * size >= length)
        if outside.any():
            step = int(outside.argmax())
            where = tuple(int(place[step]) for place in places)
            raise IndexError(f"{operand.name}: block {column[step]} of axis {axis} lies outside at grid step {where}")
        changes[1:] |= column[1:] != column[:-1]
        sizes *= np.minimum(size, length - column * size)
    return int(sizes[changes].sum())
