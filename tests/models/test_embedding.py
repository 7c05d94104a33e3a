"""Token embeddings on a mesh: rows, and gradients, of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.models.embedding import Embedding
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh

B, T, V, D = 8, 6, 24, 16


def rows_and_gradient(table: Embedding, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    def loss(table: Embedding) -> tuple[jax.Array, jax.Array]:
        x = table(tokens, jnp.dtype(jnp.float32))
        return jnp.sum(jnp.sin(x) * jnp.arange(D)), x

    gradient, x = jax.grad(loss, has_aux=True)(table)
    return x, gradient.weight[...]


@pytest.mark.parametrize(
    ("mesh", "vocab", "length"),
    [
        pytest.param(MeshConfig(fsdp=4, tensor=2), V, T, id="each device its own tokens"),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), V, 1, id="few tokens"),
        pytest.param(MeshConfig(fsdp=4, tensor=2), V + 1, T, id="a vocabulary that stays whole"),
    ],
)
def test_a_mesh_gives_the_rows_and_the_gradient_of_one_device(mesh: MeshConfig, vocab: int, length: int) -> None:
    table = Embedding(vocab, D, dtype=jnp.float32, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (B, length), 0, vocab)
    wanted = jax.jit(rows_and_gradient)(table, tokens)
    with use_mesh(make_mesh(mesh)):
        # A function of its own: the mesh is no part of what jit knows a program by.
        found = jax.jit(lambda *a: rows_and_gradient(*a))(table, tokens)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)
