"""Products of few rows, whose sides a CPU takes the other way round, against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.models.layers import FEW_ROWS, product


@pytest.mark.parametrize("out", [20, 40, 41])
@pytest.mark.parametrize("rows", [(1,), (2,), (8, 1), (2, FEW_ROWS // 2), (FEW_ROWS + 1,)])
def test_products_and_their_gradients(rows: tuple[int, ...], out: int) -> None:
    rng = np.random.default_rng(0)
    x, matrix, weight = (rng.standard_normal(shape, np.float32) for shape in ((*rows, 24), (out, 24), (*rows, out)))
    y, pull = jax.vjp(jax.jit(lambda x, matrix: product(x, matrix, jnp.dtype(jnp.float32))), x, matrix)
    dx, dmatrix = pull(jnp.asarray(weight))
    np.testing.assert_allclose(y, x @ matrix.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, weight @ matrix, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dmatrix, weight.reshape(-1, out).T @ x.reshape(-1, 24), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2,)])
def test_a_single_row_of_bfloat16_counts_as_two(rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((*rows, 24), (40, 24)))
    y, pull = jax.vjp(jax.jit(lambda x, matrix: product(x, matrix, jnp.dtype(jnp.float32))), x, matrix)
    dx, dmatrix = pull(jnp.ones_like(y))
    exact = [np.asarray(one, np.float32) for one in (x, matrix)]
    np.testing.assert_allclose(y, exact[0] @ exact[1].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.astype(np.float32), np.broadcast_to(exact[1].sum(0), x.shape), rtol=1e-2, atol=1e-2)
    total = np.broadcast_to(exact[0].reshape(-1, 24).sum(0), matrix.shape)
    np.testing.assert_allclose(dmatrix.astype(np.float32), total, rtol=1e-2, atol=1e-2)


def test_only_a_cpu_takes_the_weight_on_the_left() -> None:
    """Other devices' programs hold the one product they had, and no barrier."""
    x, matrix = jnp.ones((8, 24)), jnp.ones((40, 24))
    traced = jax.jit(lambda x, matrix: product(x, matrix, jnp.dtype(jnp.float32))).trace(x, matrix)
    for platform, barriers in (("cpu", 1), ("tpu", 0), ("cuda", 0)):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert program.count("optimization_barrier") == barriers
        assert program.count("dot_general") == 1


@pytest.mark.parametrize("rows, wide", [(1, 1), (2, 0)])
def test_only_a_cpu_takes_a_single_row_of_bfloat16_twice(rows: int, wide: int) -> None:
    x, matrix = jnp.ones((rows, 24), jnp.bfloat16), jnp.ones((40, 24), jnp.bfloat16)
    traced = jax.jit(lambda x, matrix: product(x, matrix, jnp.dtype(jnp.float32))).trace(x, matrix)
    for platform, found in (("cpu", wide), ("tpu", 0), ("cuda", 0)):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert program.count("dot_general") == 1
        assert ("-> tensor<2x24xbf16>" in program) == bool(found)
