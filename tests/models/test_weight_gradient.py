"""Gradients of linears on a mesh are those of one device, and no device sums a whole one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.models.layers import Linear, SwiGlu
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh

WIDTH = 16


def layer() -> tuple[Linear, Linear, SwiGlu]:
    """Heads out of a width, a width out of heads, and an mlp."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = Linear((4, 2), (WIDTH,), ("heads", "head_dim", "embed"), bias=True, dtype=jnp.float32, key=keys[0])
    output = Linear((WIDTH,), (4, 2), ("embed", "heads", "head_dim"), bias=False, dtype=jnp.float32, key=keys[1])
    return heads, output, SwiGlu(WIDTH, 32, bias=False, dtype=jnp.float32, key=keys[2])


def loss(layers: tuple[Linear, Linear, SwiGlu], x: jax.Array) -> jax.Array:
    heads, output, mlp = layers
    return jnp.mean(jnp.square(jnp.sin(mlp(output(heads(x))))))


X = jax.random.normal(jax.random.key(1), (8, 6, WIDTH))


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, context=2)],
    ids=["fsdp, tensor", "data, fsdp, context"],
)
def test_a_mesh_gives_the_gradients_of_one_device(mesh: MeshConfig) -> None:
    wanted = jax.jit(jax.grad(loss, argnums=(0, 1)))(layer(), X)
    with use_mesh(make_mesh(mesh)):
        # A function of its own: the mesh is no part of what jit knows a program by.
        compiled = jax.jit(lambda *a: jax.grad(loss, argnums=(0, 1))(*a)).lower(layer(), X).compile()
        found = compiled(layer(), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)
    assert compiled.as_text().count(" reduce-scatter(") >= 5, "each weight onto its shards"


def test_a_weight_that_is_not_differentiated_costs_no_sum() -> None:
    with use_mesh(make_mesh(MeshConfig(fsdp=8))):
        text = jax.jit(lambda *a: jax.grad(loss, argnums=1)(*a)).lower(layer(), X).as_text()
    assert "reduce_scatter" not in text
