"""Meshes: sizes, the order of devices, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.parallel.mesh import AXES, MeshConfig, abstract_mesh, arrange, make_mesh, mesh_line, ways_over_slices


@given(st.tuples(*[st.integers(1, 6)] * len(AXES)), st.sampled_from([None, *AXES]))
def test_the_rest_is_what_remains(sizes: tuple[int, ...], rest: str | None) -> None:
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


@pytest.mark.parametrize(
    ("config", "num_devices", "fits"),
    [
        (MeshConfig(tensor=3), 8, "what fits: tensor 1 or 2 or 4 or 8"),
        (MeshConfig(data=2, fsdp=2), 8, "what fits: data 4, or fsdp 4, or tensor 2"),
        (MeshConfig(tensor=1000), 96, "what fits: tensor 24 or 32 or 48 or 96"),
        (MeshConfig(data=3, fsdp=5, tensor=7), 8, "what fits: data 1, fsdp -1, tensor 1"),
        (MeshConfig(context=3), 8, "what fits: context 1 or 2 or 4 or 8"),
    ],
)
def test_the_refusal_names_what_would_fit(config: MeshConfig, num_devices: int, fits: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.sizes(num_devices)
    assert str(refused.value).endswith(f"devices are {num_devices}; {fits}")


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1)])
def test_sizes_that_mean_nothing_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="mesh is"):
        MeshConfig(*sizes)


ALONE = dict.fromkeys(AXES, 1)


def test_a_mesh_always_has_all_axes() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == ALONE | {"data": 2, "fsdp": len(jax.devices()) // 4, "tensor": 2}
    split = make_mesh(MeshConfig(fsdp=1, context=4, expert=-1))
    assert dict(split.shape) == ALONE | {"context": 4, "expert": len(jax.devices()) // 4}
    alone = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(alone.shape) == ALONE


def test_neighbouring_devices_share_a_tensor_group() -> None:
    mesh = make_mesh(MeshConfig(fsdp=-1, context=2, tensor=2))
    assert [d.id for d in mesh.devices[0, 0, 0].flat] == [0, 1, 2, 3]
    assert AXES[-1] == "tensor"


def test_an_abstract_mesh_has_the_same_shape() -> None:
    config = MeshConfig(data=2, fsdp=-1, tensor=2)
    assert dict(abstract_mesh(config, 8).shape) == dict(make_mesh(config).shape)
    assert dict(abstract_mesh(config, 1024).shape) == ALONE | {"data": 2, "fsdp": 256, "tensor": 2}


@dataclass(frozen=True)
class Chip:
    """What a layout asks of a TPU."""

    id: int
    coords: tuple[int, ...]
    slice_index: int = 0
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"


def torus(*shape: int, slices: int = 1, kind: str = "TPU v6 lite") -> list[Chip]:
    """The chips of TPU slices of that shape, as jax lists them."""
    places = [(*reversed(place), *[0] * (3 - len(shape))) for place in np.ndindex(*reversed(shape))]
    return [
        Chip(number, place, index, device_kind=kind)
        for number, (index, place) in enumerate(itertools.product(range(slices), places))
    ]


def sizes_of(**ways: int) -> tuple[int, ...]:
    """Sizes of all axes; those that are not named are 1."""
    assert set(ways) <= set(AXES)
    return tuple(ways.get(axis, 1) for axis in AXES)


def factorisations(count: int, axes: int = len(AXES)) -> list[tuple[int, ...]]:
    """Every way to split that many devices over so many axes."""
    if axes == 1:
        return [(count,)]
    sizes = (size for size in range(1, count + 1) if count % size == 0)
    return [(size, *rest) for size in sizes for rest in factorisations(count // size, axes - 1)]


@pytest.mark.parametrize("chips", [torus(8, 8), torus(4, 4, 8, kind="TPU v5"), torus(4, 4, slices=2)], ids=len)
def test_every_factorisation_is_laid_out(chips: list[Chip]) -> None:
    for sizes in factorisations(len(chips)):
        array, how = arrange(sizes, chips)
        assert array.shape == sizes
        assert sorted(chip.id for chip in array.flat) == [chip.id for chip in chips]
        assert "links" in how and "order of device numbers" not in how


def test_slices_are_outermost() -> None:
    """Tensor groups never cross slices while another axis can; every part of a slice is laid out alike."""
    chips = torus(4, 4, slices=2)
    for ways, over in [
        ({"fsdp": 8, "tensor": 4}, "fsdp 2"),
        ({"data": 2, "fsdp": 4, "tensor": 4}, "data 2"),
        ({"data": 4, "fsdp": 2, "tensor": 4}, "data 2"),
        ({"expert": 4, "context": 4, "tensor": 2}, "expert 2"),
        ({"tensor": 32}, "tensor 2"),
    ]:
        sizes = sizes_of(**ways)
        array, how = arrange(sizes, chips)
        assert how.startswith(f"2 slices over {over}, and inside a slice")
        index = np.vectorize(lambda chip: chip.slice_index)(array)
        axis = AXES.index(over.split()[0])
        half = sizes[axis] // 2
        assert (index.take(range(half), axis) == 0).all()
        assert (index.take(range(half, 2 * half), axis) == 1).all()
    assert ways_over_slices((2, 6, 4), 12) == (2, 6, 1)
    assert ways_over_slices((2, 3, 4), 8) == (2, 1, 4)


def test_slices_of_unequal_size_are_joined_in_order() -> None:
    chips = torus(2, 2, slices=2)[:6]
    array, how = arrange(sizes_of(fsdp=6), chips[::-1])
    assert [chip.slice_index for chip in array.flat] == [0, 0, 0, 0, 1, 1]
    assert how == "2 slices of unequal size, in the order of device numbers"


def test_the_layout_is_one_line() -> None:
    assert mesh_line(MeshConfig(fsdp=-1, tensor=2)) == (
        "mesh: data 1 x fsdp 4 x tensor 2 over 8 devices (cpu), in the order of device numbers"
    )
    assert mesh_line(MeshConfig(context=2)).startswith("mesh: data 1 x fsdp 4 x context 2 x tensor 1 over 8 devices")
    assert mesh_line(MeshConfig(tensor=4), torus(8, 8, slices=2)) == (
        "mesh: data 1 x fsdp 32 x tensor 4 over 128 devices (TPU v6 lite), 2 slices over fsdp 2, "
        "and inside a slice with an axis of links split in two"
    )


@pytest.mark.tpu_compiler
def test_real_topologies_are_laid_out(repo) -> None:
    """The chips as libtpu describes them: every factorisation, one slice and two; tensor groups are neighbours."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.real_topologies"],
        cwd=repo,
        env=os.environ | {"PYTHONPATH": str(repo), "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * 7
    for name, row in found.items():
        assert row["all laid out"], name
        assert row["released"].endswith(("along the links between chips", "with an axis of links split in two")), name
        assert row["longest step of a tensor group"] == 1, name
        assert row["released"].startswith("2 slices over fsdp 2") == name.endswith(" x 2"), name
