"""Tensors of a checkpoint as parts of parameters: how numbers get from one to the other and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rave_jax.checkpoint.safetensors_file import DTYPES, Slice, Stored, read_into
from rave_jax.families.base import Cut, TensorRule
from rave_jax.typing import NpArray


class Source(NamedTuple):
    """A stored tensor, and which part of a parameter it is.

    Fields:
        stored: the tensor.
        index: of the part, on the first axes of the parameter: layer, and entry of the layer; () where it is all of it.
        cut, swapped: as in `TensorRule`.
    """

    stored: Stored
    index: tuple[int, ...] = ()
    cut: Cut | None = None
    swapped: bool = False


def place_of(layer: int | None, entry: int | None) -> tuple[int, ...]:
    """Where a tensor stands on the first axes of its parameter: the layer's place in the stack, and its entry there."""
    return tuple(n for n in (layer, entry) if n is not None)


def read_part(source: Source, shape: Sequence[int], slices: Sequence[Slice]) -> None:
    """Fill each slice's memory with that slice of the part of a parameter.

    Args:
        source: the tensor.
        shape: of the part.
        slices: what is wanted of it.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    stored, _, cut, swapped = source
    if cut is None and not swapped:
        return read_into(stored, shape, slices)
    moved = []
    for out, index in slices:
        spans = [slice(*span.indices(n)[:2]) for span, n in zip(index, shape, strict=True)]
        if swapped:
            out, spans = out.swapaxes(-1, -2), [*spans[:-2], spans[-1], spans[-2]]
        if cut is not None:
            first = stored.shape[cut.axis] // cut.count * cut.number
            spans[cut.axis] = slice(spans[cut.axis].start + first, spans[cut.axis].stop + first)
        moved.append(Slice(out, tuple(spans)))
    return read_into(stored, stored.shape, moved)


def part_numbers(source: Source, shape: Sequence[int]) -> NpArray:
    """The whole part of a parameter, of this shape, in the number type of the file.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    out = np.empty(tuple(shape), DTYPES[source.stored.dtype])
    read_part(source, shape, [Slice(out, tuple(slice(None) for _ in shape))])
    return out


def joined(parts: Sequence[NpArray], rules: Sequence[TensorRule]) -> NpArray:
    """The tensor that these parts of parameters are.

    Args:
        parts: what the tensor's rules say of each parameter, one layer and one entry of it.
        rules: all rules of the tensor, in the order of their cuts.
    """
    first = rules[0]
    turned = [part.swapaxes(-1, -2) if rule.swapped else part for part, rule in zip(parts, rules, strict=True)]
    whole = turned[0] if first.cut is None else np.concatenate(turned, axis=first.cut.axis)
    return whole.reshape(first.shape)
