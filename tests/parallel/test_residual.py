"""Between the matmuls of a layer each device along `tensor` has its own tokens, and the numbers are those of one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.models.layers import RmsNorm, SwiGlu
from rave_jax.parallel import residual
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh

WIDTH, ROWS, TOKENS = 16, 4, 8
NORM = RmsNorm(WIDTH, eps=1e-6, dtype=jnp.float32)
MLP = SwiGlu(WIDTH, 32, bias=True, dtype=jnp.float32, key=jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH))


STREAM = residual.Stream(split=True)


def block(layers: tuple[RmsNorm, SwiGlu], x: jax.Array) -> jax.Array:
    """The stream and what the mlp of a layer adds to it."""
    norm, mlp = layers
    x = STREAM.placed(x)
    return STREAM.placed(x + STREAM.scattered(mlp(STREAM.gathered(norm(x)))))


def gradients(layers: tuple[RmsNorm, SwiGlu], x: jax.Array) -> tuple[tuple[RmsNorm, SwiGlu], jax.Array]:
    return jax.grad(lambda *of: jnp.sum(jnp.sin(block(*of))), argnums=(0, 1))(layers, x)


@pytest.mark.parametrize(
    ("mesh", "tokens", "share"),
    [
        (MeshConfig(fsdp=2, tensor=4), TOKENS, 2),
        (MeshConfig(fsdp=1, context=2, tensor=4), TOKENS, 1),
        (MeshConfig(fsdp=2, tensor=4), 6, 6),
        (MeshConfig(fsdp=2, tensor=4), 1, 1),
    ],
    ids=["tensor", "context and tensor", "tokens that do not divide", "one token"],
)
def test_devices_share_the_tokens_and_give_the_gradients_of_one(mesh: MeshConfig, tokens: int, share: int) -> None:
    x = X[:, :tokens]
    wanted, plain = jax.jit(lambda *of: gradients(*of))((NORM, MLP), x), block((NORM, MLP), x)
    with use_mesh(make_mesh(mesh)):
        out = jax.jit(lambda *of: block(*of))((NORM, MLP), x)
        found = jax.jit(lambda *of: gradients(*of))((NORM, MLP), x)
    assert out.sharding.shard_shape(out.shape)[1] == share
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (out, found), (plain, wanted))


def test_rows_that_cannot_be_shared_are_refused_by_their_field() -> None:
    residual.check_tokens(24, 1, 4, "data.tokens")
    residual.check_tokens(7, 1, 1, "data.tokens")
    with pytest.raises(ConfigError, match=r"^data.tokens is 20, expected a multiple of 8: .*mesh.context 2 times mesh"):
        residual.check_tokens(20, 2, 4, "data.tokens")
