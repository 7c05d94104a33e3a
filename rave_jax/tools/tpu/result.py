"""What the TPU compiler said of one program."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

_ARRAY = re.compile(r"\b(pred|bf16|[csuf]\d+\w*)\[([\d,]*)\]")


class Array(NamedTuple):
    """Type of an array in a compiled program, as HLO writes it: `bf16`, `f32`, `s32`, `pred`."""

    dtype: str
    shape: tuple[int, ...]


class Memory(NamedTuple):
    """HBM of one chip, in bytes. `peak` counts donated arguments once, so it may be less than the sum of the rest."""

    arguments: int
    outputs: int
    temporaries: int
    peak: int


class Stretch(NamedTuple):
    """Some bundles (instruction words) of a program.

    A bundle issues in one cycle, more if it has to wait; loops and skipped branches are not unfolded.

    Args:
        bundles: how many.
        used: slot -> share of its capacity that is used, 0 to 1. `VLOAD:FILL` and `VSTORE:SPILL` are the parts of
            `VLOAD` and `VSTORE` that move registers to memory and back for want of registers.
        spills: registers stored for want of registers.
    """

    bundles: int
    used: Mapping[str, float]
    spills: int

    @property
    def fullest(self) -> str:
        """The slot that is used most: what bounds the stretch if nothing waits."""
        return max((slot for slot in self.used if ":" not in slot), key=lambda slot: self.used[slot])


class Bundles(NamedTuple):
    """Bundles of one HLO op: all of them, and the longest stretch without a branch, which in a kernel is its work."""

    whole: Stretch
    longest: Stretch


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One case: a program, or why there is none.

    Args:
        error: None if it compiled.
        seconds: of tracing, lowering and compiling.
        memory: of the program on one chip.
        hlo: text of the optimised program; "" unless asked for.
        cycles: HLO op -> the compiler's static estimate; empty unless asked for. It counts branches on data that is
            known only at run time as not taken, and leaves out contention: compare within a chip.
        bundles: HLO op -> its bundles; empty unless asked for.
    """

    error: str | None
    seconds: float = 0.0
    memory: Memory | None = None
    hlo: str = ""
    cycles: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bundles: Mapping[str, Bundles] = dataclasses.field(default_factory=dict)

    @property
    def arrays(self) -> frozenset[Array]:
        """Every type of array that occurs in `hlo`, the insides of fusions among them, those of Pallas kernels not.

        Raises:
            ValueError: the text was not asked for, or nothing compiled: an empty answer would prove nothing.
        """
        if not self.hlo:
            raise ValueError("no HLO text: ask for it with hlo=True, and look at .error first")
        found = _ARRAY.findall(self.hlo)
        return frozenset(Array(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in found)

    def kernel_cycles(self, name: str) -> int:
        """The estimate of the one op whose name contains `name`, such as the name of a Pallas call.

        Raises:
            ValueError: none does, or several do.
        """
        return self.cycles[self._the_op(self.cycles, name)]

    def kernel_bundles(self, name: str) -> Bundles:
        """The bundles of the one op whose name contains `name`. Raises as `kernel_cycles` does."""
        return self.bundles[self._the_op(self.bundles, name)]

    def _the_op(self, ops: Mapping[str, object], name: str) -> str:
        found = [op for op in ops if name in op]
        if len(found) != 1:
            raise ValueError(f"{len(found)} ops are called {name!r}: {sorted(ops)}; error: {self.error}")
        return found[0]
