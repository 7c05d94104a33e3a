"""Options of the TPU compiler by chip, for whole steps on several chips: what makes their collectives asynchronous."""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import AbstractMesh, Mesh

_GATHERED_FIRST = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
"""Weights are gathered before the matmul. By default these chips send them round in as many parts as there are shards,
and add each part's product to the whole result, which goes to HBM and back for every part."""
_SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{what}": True
    for what in ("all_gather", "2d_all_gather", "reduce_scatter", "all_reduce")
}

OPTIONS: Mapping[str, Mapping[str, bool | int]] = {
    # The compiler of this chip starts gathers of weights early by default.
    "TPU v5 lite": {},
    # Without them no collective of these chips is asynchronous: their sparse cores run them beside the matmuls.
    "TPU v5": _SPARSE_CORES | _GATHERED_FIRST,
    "TPU v6 lite": _SPARSE_CORES | _GATHERED_FIRST,
    # This one does so by default.
    "TPU7x": _GATHERED_FIRST,
}
"""`device_kind` -> options. Only those that change the collectives of a compiled step; BENCHMARKS.md says how."""


def compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, bool | int]:
    """Options for a program over this mesh; none for one device, for other chips, and for what is no TPU."""
    device = mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    if device is None or mesh.size == 1:
        return {}
    return dict(OPTIONS.get(device.device_kind, {}))
