"""The device mesh: three named axes, always all three, so that one set of sharding rules serves any layout.

`data` replicates parameters and splits rows, `fsdp` splits both rows and parameters, `tensor` splits heads,
mlp width and vocabulary. Axes of size 1 cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from rave_jax.config import ConfigError, require

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out."""

    data: int = 1
    """Replicas of the whole model; rows are split over them."""
    fsdp: int = -1
    """Ways in which parameters, optimizer state and rows are split; -1 takes all remaining devices."""
    tensor: int = 1
    """Ways in which heads, mlp width and vocabulary are split; rows are not."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        require(all(s == -1 or s >= 1 for s in sizes), "mesh", sizes, "sizes of at least 1, or -1 for the rest")
        require(sizes.count(-1) <= 1, "mesh", sizes, "at most one -1")

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) for that many devices.

        Raises:
            ConfigError: the sizes do not multiply to the number of devices.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        fixed = math.prod(s for s in sizes if s != -1)
        if -1 in sizes and num_devices % fixed == 0:
            sizes[sizes.index(-1)] = num_devices // fixed
        if -1 in sizes or math.prod(sizes) != num_devices:
            raise ConfigError(
                f"mesh is data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}, but devices are {num_devices}"
            )
        return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of the job), neighbours on `tensor` first.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    # Auto axes: shardings are propagated by the compiler and pinned by `sharding.shard` where it matters.
    return jax.make_mesh(config.sizes(len(devices)), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def abstract_mesh(config: MeshConfig, num_devices: int, tpu_kind: str | None = None) -> AbstractMesh:
    """The mesh that `config` makes of that many devices, without the devices.

    Args:
        config: how they are laid out.
        num_devices: how many.
        tpu_kind: `device_kind` of the TPUs they would be, which lets kernels be chosen for them.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    device = None if tpu_kind is None else AbstractDevice(tpu_kind, num_cores=1, platform="tpu")
    return AbstractMesh(config.sizes(num_devices), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
