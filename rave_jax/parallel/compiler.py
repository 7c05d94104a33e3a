"""Options of the TPU compiler by chip, for whole steps on several chips: what makes their collectives asynchronous."""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import AbstractMesh, Mesh

_SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{what}": True
    for what in ("all_gather", "2d_all_gather", "reduce_scatter", "all_reduce")
}

OPTIONS: Mapping[str, Mapping[str, bool]] = {
    # The compiler of this chip starts gathers of weights early by default.
    "TPU v5 lite": {},
    # Without them no collective of this chip is asynchronous: its sparse cores run them beside the matmuls.
    "TPU v6 lite": _SPARSE_CORES,
}
"""`device_kind` -> options. Only those that change the collectives of a compiled step; BENCHMARKS.md says how."""


def compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, bool]:
    """Options for a program over this mesh; none for one device, for other chips, and for what is no TPU."""
    device = mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    if device is None or mesh.size == 1:
        return {}
    return dict(OPTIONS.get(device.device_kind, {}))
