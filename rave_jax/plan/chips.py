"""What TPU chips can do at most, by their maker's public documents.

Sources: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x; for links, jax-ml.github.io/scaling-book/tpus. Those
pages give the interconnect of a chip as the sum over its links; here it stands for one link and one direction. They
give the network between slices for a pod, or for a host; here it stands for one chip. The link of a chip to its host
(PCIe) is by the same book, which gives none for tpu7x: that of v6e stands there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from rave_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax counts them: a whole chip, but half of one of tpu7x.

    Args:
        name: as in `v5e:16x16`.
        kind: jax's `device_kind`.
        flops: bfloat16 FLOP/s.
        hbm: bytes of HBM.
        usable: bytes that the compiler gives to a program; its errors say so.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s of one link to a neighbour, in one direction.
        dcn_bandwidth: bytes/s between slices, in one direction.
        host_bandwidth: bytes/s between a device and the memory of its host, in one direction.
        axes: dimensions of the torus.
        devices: of a chip.
        example: of a topology.
    """

    name: str
    kind: str
    flops: float
    hbm: int
    usable: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    host_bandwidth: float
    axes: int
    devices: int
    example: str


GIB = 2**30
MOST_DEVICES = 2**17
"""More than any job has. Each is described before anything is compiled."""
CHIPS = (
    # 197 TFLOP/s, 16 GB, 819 GB/s; four links, 400 GB/s in both directions together; 6.4 Tbit/s for 256 chips.
    Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 50e9, 3.125e9, 16e9, 2, 1, "v5e:16x16"),
    # 459 TFLOP/s, 95 GiB, 2765 GB/s; six links, 1200 GB/s in both directions together; 50 Gbit/s a chip.
    Chip("v5p", "TPU v5", 459e12, 95 * GIB, 95 * GIB, 2765e9, 100e9, 6.25e9, 16e9, 3, 1, "v5p:4x4x4"),
    # 918 TFLOP/s, 32 GB, 1600 GB/s; four links, 800 GB/s in both directions together; 25.6 Tbit/s for 256 chips.
    Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, int(31.24 * GIB), 1600e9, 100e9, 12.5e9, 32e9, 2, 1, "v6e:8x8"),
    # 2307 TFLOP/s, 192 GiB, 7380 GB/s; six links, 1200 GB/s in both directions together; 100 Gbit/s a chip; each chip
    # is two devices, which share its links.
    Chip("tpu7x", "TPU7x", 1153.5e12, 96 * GIB, int(94.74 * GIB), 3690e9, 50e9, 6.25e9, 32e9, 3, 2, "tpu7x:4x4x4"),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several alike.

    Args:
        chip: of all.
        shape: chips along each dimension of a slice.
        slices: how many.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        slice_name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return slice_name if self.slices == 1 else f"{self.slices} slices of {slice_name}"

    @property
    def devices(self) -> int:
        """Of all slices, as jax counts them."""
        return math.prod(self.shape) * self.chip.devices * self.slices

    @property
    def name(self) -> str:
        """Of one slice, as libtpu takes it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """What `v5e:16x16` names.

    Raises:
        ConfigError: no such chip, or no shape that its links can have.
    """
    known = ", ".join(f"{chip.name} (as {chip.example})" for chip in CHIPS)
    name, _, shape = text.partition(":")
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    if chip is None:
        raise ConfigError(f"--topology is {text!r}, expected CHIP:SHAPE with one of the chips {known}")
    sides = shape.split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides) or len(sides) > 3:
        raise ConfigError(f"--topology is {text!r}, expected a shape of {chip.axes} sizes, as {chip.example}")
    sizes = tuple(map(int, sides))
    if len(sizes) != chip.axes:
        raise ConfigError(
            f"--topology is {text!r}, but chips of {chip.name} lie in {chip.axes} dimensions: expected a shape as "
            f"{chip.example}"
        )
    if slices < 1:
        raise ConfigError(f"--slices is {slices}, expected at least 1")
    topology = Topology(chip, sizes, slices)
    if topology.devices > MOST_DEVICES:
        raise ConfigError(f"{topology} have {topology.devices:,} devices, expected at most {MOST_DEVICES:,}")
    return topology


def links(coordinates: Sequence[Sequence[int]], shape: Sequence[int]) -> int:
    """Links of a chip that a collective of chips at these coordinates can use at once, at the most.

    A dimension along which the chips differ gives two, one to each side, and one where the slice has only two chips.

    Args:
        coordinates: of the chips of a group.
        shape: of the slice.
    """
    differ = [len({place[axis] for place in coordinates}) > 1 for axis in range(len(shape))]
    return sum(2 if size > 2 else 1 for size, differs in zip(shape, differ, strict=True) if differs)
