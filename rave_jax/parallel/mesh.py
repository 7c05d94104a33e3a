"""The device mesh: five named axes, always all five, so that one set of sharding rules serves any sizes.

`data` replicates parameters and splits rows; `fsdp` splits rows and parameters; `expert` splits rows, parameters and
experts; `context` splits the tokens of a row, and parameters; `tensor` splits heads, mlp width, experts and vocabulary.
Axes of size 1 cost nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from rave_jax.config import ConfigError, require

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""From the axis whose devices may be furthest apart to the one whose devices are neighbours."""
USUAL = ("data", "fsdp", "tensor")
"""Axes that messages name also where they are of size 1."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged."""

    data: int = 1
    """Number of replicas of the model; rows are split over them."""
    fsdp: int = -1
    """Number of shards of parameters, optimizer state and rows; -1 takes all remaining devices."""
    tensor: int = 1
    """Number of shards of heads, mlp width, experts and vocabulary; rows are not split by it."""
    context: int = 1
    """Number of shards of the tokens of each row, and of parameters and optimizer state; rows are not split by it."""
    expert: int = 1
    """Number of shards of experts, and of rows, parameters and optimizer state; for models with experts."""
    allow_whole: bool = False
    """Train although a large parameter stays whole along an axis of the mesh whose size does not divide it?"""

    def __post_init__(self) -> None:
        sizes = self.given()
        require(all(s == -1 or s >= 1 for s in sizes), "mesh", sizes, "sizes of at least 1, or -1 for the rest")
        require(sizes.count(-1) <= 1, "mesh", sizes, "at most one -1")

    def given(self) -> tuple[int, ...]:
        """The size of each of `AXES` as it is written, -1 for the rest."""
        return self.data, self.fsdp, self.expert, self.context, self.tensor

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """The size of each of `AXES` for that many devices.

        Raises:
            ConfigError: the sizes do not multiply to the number of devices; the message names sizes that do.
        """
        sizes = list(self.given())
        fixed = math.prod(s for s in sizes if s != -1)
        if -1 in sizes and num_devices % fixed == 0:
            sizes[sizes.index(-1)] = num_devices // fixed
        if -1 in sizes or math.prod(sizes) != num_devices:
            raise ConfigError(
                f"mesh is {_in_words(self.given())}, but devices are {num_devices}; {self._what_fits(num_devices)}"
            )
        return tuple(sizes)

    def _what_fits(self, num_devices: int) -> str:
        """Changes of one size that would do, in words."""
        if num_devices < 1:
            return "there are no devices"
        found = []
        for axis in (axis for axis in AXES if axis in USUAL or getattr(self, axis) != 1):
            others = math.prod(max(getattr(self, other), 1) for other in AXES if other != axis)
            rest = any(getattr(self, other) == -1 for other in AXES if other != axis)
            if getattr(self, axis) == -1 or num_devices % others:
                continue
            most = num_devices // others
            sizes = [d for d in range(1, math.isqrt(most) + 1) if most % d == 0]
            sizes = sorted({*sizes, *(most // d for d in sizes)}) if rest else [most]
            given = getattr(self, axis)
            nearest = [size for _, size in sorted((abs(size - given), size) for size in sizes)[:4]]
            found.append(f"{axis} {' or '.join(map(str, sorted(nearest)))}")
        return f"what fits: {', or '.join(found)}" if found else "what fits: data 1, fsdp -1, tensor 1"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of the job), neighbours on `tensor` first.

    Any sizes that multiply to the number of devices are arranged; `mesh_line` says how.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    array, _ = arrange(sizes, devices)
    # Auto axes: shardings are propagated by the compiler and pinned by `sharding.shard` where it matters.
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_line(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> str:
    """How `make_mesh` lays the devices out, in one line."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    where = f"{len(devices)} devices ({devices[0].device_kind})"
    return f"mesh: {_in_words(sizes)} over {where}, {arrange(sizes, devices)[1]}"


def _in_words(sizes: Sequence[int]) -> str:
    named = [(axis, size) for axis, size in zip(AXES, sizes, strict=True) if axis in USUAL or size != 1]
    return " x ".join(f"{axis} {size}" for axis, size in named)


def arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> tuple[np.ndarray, str]:
    """Where each device stands in the mesh.

    Slices of TPUs are joined by a slow network, so they are outermost: `data` is split over them, then what is left of
    them over `fsdp`, and so on in the order of `AXES`. Inside a slice jax lays axes along the links between chips;
    where no axis fits whole links, it may split a link between two axes. What jax cannot lay out at all is taken in the
    order of device numbers.

    Args:
        sizes: of `AXES`; their product is the number of devices.
        devices: all devices.

    Returns:
        The devices, an array of those sizes, and how they were arranged, in words.
    """
    slices: dict[int, list[jax.Device]] = defaultdict(list)
    for device in devices:
        slices[_slice_of(device)].append(device)
    count = len(slices)
    if len({len(slice) for slice in slices.values()}) > 1:
        ordered = [device for index in sorted(slices) for device in slices[index]]
        return _as_array(ordered, sizes), f"{count} slices of unequal size, in the order of device numbers"
    outer = ways_over_slices(sizes, count)
    inner = tuple(size // ways for size, ways in zip(sizes, outer, strict=True))
    parts, hows = zip(*(_lay_out_slice(inner, slices[index]) for index in sorted(slices)), strict=True)
    if count == 1:
        return parts[0], hows[0]
    # Each axis is made of its parts over slices and, inside those, its parts within a slice.
    axes = [n + inside for n in range(len(sizes)) for inside in (0, len(sizes))]
    array = np.stack(parts).reshape(*outer, *inner).transpose(axes).reshape(sizes)
    over = " x ".join(f"{axis} {ways}" for axis, ways in zip(AXES, outer, strict=True) if ways > 1)
    return array, f"{count} slices over {over}, and inside a slice {hows[0]}"


def ways_over_slices(sizes: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """How many parts of each axis lie in different slices: as many as possible of the first, then of the next.

    Sizes whose product is a multiple of the number of slices leave no rest.
    """
    ways = []
    for size in sizes:
        ways.append(math.gcd(size, slices))
        slices //= ways[-1]
    return tuple(ways)


def _slice_of(device: jax.Device) -> int:
    # CPUs and GPUs may number slices too; their meshes follow the order of devices, which are sorted by process.
    return (getattr(device, "slice_index", None) or 0) if device.platform == "tpu" else 0


def _lay_out_slice(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> tuple[np.ndarray, str]:
    # At least one axis, also where all are of size 1.
    large = [size for size in sizes if size > 1] or [1]
    for split in (False, True):
        try:
            array = mesh_utils.create_device_mesh(large, devices, allow_split_physical_axes=split).reshape(sizes)
        # Depending on chip and version, jax raises any of these for sizes that it cannot lay along the links. The order
        # of device numbers serves all sizes, and the returned words say that it was taken.
        except (NotImplementedError, ValueError, AssertionError, IndexError):
            continue
        if devices[0].platform != "tpu":
            return array, "in the order of device numbers"
        return array, "with an axis of links split in two" if split else "along the links between chips"
    return _as_array(devices, sizes), "in the order of device numbers, which need not follow the links between chips"


def _as_array(devices: Sequence[jax.Device], sizes: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(devices), object)
    array[:] = devices
    return array.reshape(sizes)


def abstract_mesh(config: MeshConfig, num_devices: int, tpu_kind: str | None = None) -> AbstractMesh:
    """The mesh that `config` makes of that many devices, without the devices.

    Args:
        config: how they are arranged.
        num_devices: how many.
        tpu_kind: `device_kind` of the TPUs they would be, which lets kernels be chosen for them.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    device = None if tpu_kind is None else AbstractDevice(tpu_kind, num_cores=1, platform="tpu")
    return AbstractMesh(
        config.sizes(num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=device
    )
