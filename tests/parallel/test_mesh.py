"""Meshes: sizes, the order of devices, and what is refused."""

from __future__ import annotations

import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.parallel.mesh import AXES, MeshConfig, abstract_mesh, make_mesh


@given(st.tuples(*[st.integers(1, 6)] * 3), st.sampled_from([None, *AXES]))
def test_the_rest_is_what_remains(sizes: tuple[int, int, int], rest: str | None) -> None:
    fields = dict(zip(AXES, sizes, strict=True))
    if rest:
        fields[rest] = -1
    assert MeshConfig(**fields).sizes(math.prod(sizes)) == sizes


@pytest.mark.parametrize(
    ("config", "num_devices"),
    [
        (MeshConfig(data=3, fsdp=-1), 8),
        (MeshConfig(data=2, fsdp=2, tensor=1), 8),
        (MeshConfig(data=4, fsdp=4, tensor=1), 8),
        (MeshConfig(data=16, fsdp=-1), 8),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(config: MeshConfig, num_devices: int) -> None:
    with pytest.raises(ConfigError, match=f"devices are {num_devices}"):
        config.sizes(num_devices)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1)])
def test_sizes_that_mean_nothing_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="mesh is"):
        MeshConfig(*sizes)


def test_a_mesh_always_has_all_three_axes() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": len(jax.devices()) // 4, "tensor": 2}
    alone = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(alone.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_neighbouring_devices_share_a_tensor_group() -> None:
    mesh = make_mesh(MeshConfig(fsdp=-1, tensor=2))
    assert [d.id for d in mesh.devices[0, 0]] == [0, 1]


def test_an_abstract_mesh_has_the_same_shape() -> None:
    config = MeshConfig(data=2, fsdp=-1, tensor=2)
    assert dict(abstract_mesh(config, 8).shape) == dict(make_mesh(config).shape)
    assert dict(abstract_mesh(config, 1024).shape) == {"data": 2, "fsdp": 256, "tensor": 2}
