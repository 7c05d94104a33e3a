"""Lays out meshes over the chips that libtpu describes, and prints what came of it as JSON. Needs no TPU."""

from __future__ import annotations

import json

import numpy as np
from jax.experimental import topologies

from rave_jax.parallel.mesh import arrange
from tests.parallel.test_mesh import factorisations, sizes_of

TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:8x8x8", "v6e:8x8", "v6e:16x16", "tpu7x:4x4x4")
TENSOR = 4
"""Of the released configs."""


def steps(group: np.ndarray, shape: np.ndarray) -> int:
    """Links between devices that follow each other in a group, at most, on a torus."""
    places = np.array([device.coords for device in group])
    apart = np.abs(np.diff(places, axis=0))
    return int(np.minimum(apart, shape - apart).sum(axis=1).max())


def main() -> None:
    found = {}
    for name in TOPOLOGIES:
        for slices in (1, 2):
            several = {"num_slices": slices} if slices > 1 else {}
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices
            count = len(devices)
            shape = np.array([device.coords for device in devices]).max(axis=0) + 1
            released, how = arrange(sizes_of(fsdp=count // TENSOR, tensor=TENSOR), devices)
            every = (arrange(sizes, devices)[0] for sizes in factorisations(count) if sizes[0] in (1, 2))
            found[f"{name} x {slices}"] = {
                "all laid out": all(len(set(map(id, array.flat))) == count for array in every),
                "released": how,
                "longest step of a tensor group": max(steps(group, shape) for group in released.reshape(-1, TENSOR)),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
