"""What is known of a compiled step: plain numbers, which a process can hand to another."""

from __future__ import annotations

import dataclasses

from rave_jax.plan.collectives import Traffic
from rave_jax.plan.flops import StepFlops


@dataclasses.dataclass(frozen=True)
class Hbm:
    """Bytes of one chip.

    Args:
        parameters: trained and frozen.
        optimizer: its state, and the counters of a run.
        batch: one, on the device.
        temporaries: what the program takes beside its arguments at its fullest: activations, gradients, workspace.
        code: the program itself; 0 where none was made.
        peak: all of it at its fullest. Where the step does not fit, what the compiler wanted.
        host: not of the chip, but of its share of the host's memory: optimizer state and activations that wait there.
    """

    parameters: int
    optimizer: int
    batch: int
    temporaries: int
    code: int
    peak: int
    host: int = 0


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind over the same axes, and what carries them.

    Args:
        traffic: what they send.
        links: of a chip that they can use at once, at the most.
        slices: over which a group goes.
    """

    traffic: Traffic
    links: int
    slices: int

    @property
    def between_slices(self) -> float:
        """Bytes that a chip sends to other slices in one run: each slice gathers or sums inside itself first."""
        if self.slices == 1:
            return 0.0
        inside = self.traffic.members // self.slices
        ring = (self.traffic.members - 1) / self.traffic.members
        if self.traffic.kind == "collective-permute":
            return self.traffic.sent
        return self.traffic.sent / ring * (self.slices - 1) / self.slices / inside


@dataclasses.dataclass(frozen=True)
class Placed:
    """Parameters of one group that are split alike.

    Args:
        group: of the optimizer.
        axes: how each dimension is split, as `fsdp, tensor, whole`.
        state: trained or frozen.
        tensors, parameters: how many.
        bytes: of the parameters on one chip.
        largest: the largest tensor.
    """

    group: str
    axes: str
    state: str
    tensors: int
    parameters: int
    bytes: int
    largest: str


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was compiled for a topology.

    Args:
        fits: does the compiler place it into the chip's HBM?
        hbm: of one chip.
        seconds: of tracing, lowering and compiling.
        mesh: how devices are laid out, in one line.
        placed: parameters.
        flops: of one step over all chips.
        devices: how many.
        backends: which implementation each operation takes, and why.
        moved: collectives; none where it does not fit.
        hbm_traffic: bytes between a chip and its HBM in one step, at the least.
        host_traffic: bytes between a chip and its host in one step, both ways together.
        depths: where not all layers were compiled: the two numbers of layers that were, and that of all.
        uncounted: loops whose trips are not known before the run; what is in them counts once.
    """

    fits: bool
    hbm: Hbm
    seconds: float
    mesh: str
    placed: tuple[Placed, ...]
    flops: StepFlops
    devices: int
    backends: tuple[str, ...]
    moved: tuple[Moved, ...] = ()
    hbm_traffic: float = 0.0
    host_traffic: float = 0.0
    depths: tuple[int, int, int] | None = None
    uncounted: tuple[str, ...] = ()
