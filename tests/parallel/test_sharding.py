"""Sharding rules: where logical axes go, and that the compiler obeys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from rave_jax.parallel.mesh import AXES, MeshConfig, abstract_mesh, make_mesh
from rave_jax.parallel.sharding import RULES, named_sharding, partition_spec, replicated, shard, use_mesh

MESH = abstract_mesh(MeshConfig(data=2, fsdp=4, tensor=2), 16)


def test_rules_name_mesh_axes_only() -> None:
    for rule in RULES.values():
        assert set((rule,) if isinstance(rule, str) else rule or ()) <= set(AXES)


def test_a_weight_is_split_where_its_size_divides() -> None:
    assert partition_spec(("mlp", "embed"), (64, 32), MESH) == P("tensor", "fsdp")
    assert partition_spec(("layers", "kv_heads", "head_dim", "embed"), (3, 2, 8, 32), MESH) == P(
        None, "tensor", None, "fsdp"
    )
    assert partition_spec(("batch", "length", None), (16, 7, 5), MESH) == P(("data", "fsdp"), None, None)


def test_an_axis_that_does_not_divide_stays_whole() -> None:
    assert partition_spec(("kv_heads", "embed"), (3, 32), MESH) == P(None, "fsdp")
    assert partition_spec(("batch",), (3,), MESH) == P(None)


def test_of_several_mesh_axes_the_last_are_left_out_until_the_size_divides() -> None:
    every = abstract_mesh(MeshConfig(data=2, fsdp=4, expert=2, context=2, tensor=2), 64)
    for size, axes in [(32, ("fsdp", "expert", "context")), (8, ("fsdp", "expert")), (4, "fsdp"), (2, None)]:
        assert partition_spec(("embed",), (size,), every) == P(axes)
    assert partition_spec(("batch", "length"), (16, 4), every) == P(("data", "fsdp", "expert"), "context")
    assert partition_spec(("batch",), (4,), MESH) == P("data")
    assert partition_spec(("experts", None, "expert_embed"), (8, 3, 32), every) == P(
        ("expert", "tensor"), None, ("fsdp", "context")
    )


def test_axes_of_size_one_leave_no_trace() -> None:
    alone = abstract_mesh(MeshConfig(), 1)
    assert partition_spec(("mlp", "embed"), (64, 32), alone) == P(None, None)


def test_an_unknown_axis_or_a_wrong_rank_is_an_error() -> None:
    with pytest.raises(KeyError):
        partition_spec(("mpl",), (4,), MESH)
    with pytest.raises(ValueError):
        partition_spec(("mlp",), (4, 4), MESH)


@given(st.lists(st.tuples(st.sampled_from([*RULES, None]), st.integers(1, 64)), max_size=4))
def test_whatever_is_split_is_split_evenly(axes: list[tuple[str | None, int]]) -> None:
    names, shape = tuple(n for n, _ in axes), tuple(s for _, s in axes)
    used = [rule for rule in partition_spec(names, shape, MESH) if rule is not None]
    flat = [name for rule in used for name in ((rule,) if isinstance(rule, str) else rule)]
    if len(flat) == len(set(flat)):  # no real array has one logical axis twice, and jax refuses it
        named_sharding(names, shape, MESH).shard_shape(shape)  # raises where a size does not divide


def test_shard_is_the_identity_without_a_mesh() -> None:
    x = jnp.ones((4, 4))
    assert shard(x, "batch", "length") is x
    with use_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert shard(x, "batch", "length") is x


def test_shard_pins_under_jit_and_only_inside_the_context() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    x = jnp.arange(32.0).reshape(8, 4)

    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        return shard(2 * x, "batch", "mlp")

    with use_mesh(mesh):
        y = double(x)
    assert y.sharding.is_equivalent_to(named_sharding(("batch", "mlp"), (8, 4), mesh), 2)
    assert y.sharding.shard_shape(y.shape) == (2, 2)
    np.testing.assert_array_equal(y, 2 * x)
    assert shard(x, "batch", "mlp") is x, "the mesh ends with its context"


def test_an_abstract_mesh_lowers_for_devices_that_are_not_here() -> None:
    pod = abstract_mesh(MeshConfig(data=4, fsdp=32, tensor=4), 512)
    x = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=named_sharding(("batch", None), (512, 64), pod))
    with use_mesh(pod):
        text = jax.jit(lambda x: shard(x @ x.T, "batch", None)).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert "mhlo.num_partitions = 512" in text


def test_replicated_means_the_whole_array_everywhere() -> None:
    mesh = make_mesh(MeshConfig())
    x = jax.device_put(np.arange(4.0), replicated(mesh))
    assert all(s.data.shape == (4,) for s in x.addressable_shards)
    assert len(x.addressable_shards) == len(jax.devices())
