"""A Pallas call before it is made: its grid and blocks to count from, and a copy of it that an estimate can read.

libtpu's cycle estimate says nothing at all of a kernel that copies a block in several pieces, as our kernels copy a
block of queries (one piece for each head). So estimates are made of the same kernel over operands that lie block after
block: each block is then one piece with the same bytes, and the kernel sees the same refs. Copies overlap with the work
and do not bound these kernels; `kernel_bytes` counts them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.tools.tpu import Operand


class _Captured(Exception):
    """A Pallas call that was about to be made."""


class Captured(NamedTuple):
    """All of a Pallas call.

    Args:
        kernel: its body.
        grid_spec: grid and blocks.
        out_shape: of its outputs.
        settings: further arguments of `pallas_call`.
        args: prefetched scalars and inputs, or their shapes.
    """

    kernel: Callable[..., None]
    grid_spec: Any
    out_shape: Sequence[Any]
    settings: dict[str, Any]
    args: Sequence[Any]

    @property
    def inputs(self) -> Sequence[Any]:
        """Without the scalars."""
        return self.args[self.grid_spec.num_scalar_prefetch :]

    @property
    def operands(self) -> list[Operand]:
        """Inputs and outputs that have blocks."""
        both = [*zip(self.grid_spec.in_specs, self.inputs, strict=True)]
        both += zip(self.grid_spec.out_specs, self.out_shape, strict=True)
        return [Operand.of(str(n), spec, x) for n, (spec, x) in enumerate(both) if spec.block_shape is not None]

    def block_by_block(self, place: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The same kernel over operands whose blocks lie one after the other, as `compile_cases` takes it."""
        old = self.grid_spec
        scalars = old.num_scalar_prefetch
        grid_spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=old.grid,
            in_specs=[_one_piece(spec) for spec in old.in_specs],
            out_specs=[_one_piece(spec) for spec in old.out_specs],
            scratch_shapes=old.scratch_shapes,
        )
        pairs = zip(old.out_specs, self.out_shape, strict=True)
        out_shape = [jax.ShapeDtypeStruct(_cut(spec, x.shape), x.dtype) for spec, x in pairs]
        settings = {name: value for name, value in self.settings.items() if name != "cost_estimate"}
        run = pl.pallas_call(self.kernel, grid_spec=grid_spec, out_shape=out_shape, **settings)
        args = [place(x.shape, x.dtype) for x in self.args[:scalars]]
        args += [place(_cut(spec, x.shape), x.dtype) for spec, x in zip(old.in_specs, self.inputs, strict=True)]
        return run, tuple(args)


def _one_piece(spec: Any) -> Any:
    if spec.block_shape is None:
        return spec
    rank = len(spec.block_shape)
    block = (*(None,) * rank, *spec.block_shape)
    return pl.BlockSpec(block, lambda *step: (*spec.index_map(*step), *(0,) * rank))


def _cut(spec: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    if spec.block_shape is None:
        return shape
    return (*(n // size for n, size in zip(shape, spec.block_shape, strict=True)), *spec.block_shape)


def captured(call: Callable[..., Any], *args: Any) -> Captured:
    """The one Pallas call that `call(*args)` would make; shapes will do as its arguments where it only hands them on.

    Raises:
        ValueError: it makes none.
    """

    def instead(kernel: Any, *, grid_spec: Any, out_shape: Any, **settings: Any) -> Any:
        def run(*args: Any) -> Any:
            raise _Captured(Captured(kernel, grid_spec, out_shape, settings, args))

        return run

    with mock.patch.object(pl, "pallas_call", instead):
        try:
            call(*args)
        except _Captured as made:
            return made.args[0]
    raise ValueError("no Pallas call was made")
