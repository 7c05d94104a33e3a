"""Grouped products against a loop over groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.kernels.grouped import grouped_product

ROWS, INTO, OUT, GROUPS = 300, 5, 7, 6
SIZES = {
    "all_rows": [3, 0, 97, 200, 0, 0],
    "rows_behind_all_groups": [1, 130, 0, 0, 2, 0],
    "one_group": [0, 0, 0, 300, 0, 0],
    "no_row": [0] * GROUPS,
}


@jax.jit
def product_and_gradients(x, weight, sizes, ct):
    made, pull = jax.vjp(lambda x, weight: grouped_product(x, weight, sizes), x, weight)
    return made, *pull(ct)


@pytest.mark.parametrize("name", SIZES)
def test_each_group_is_multiplied_by_its_own_matrix(name: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((ROWS, INTO)), rng.standard_normal((GROUPS, OUT, INTO))
    ct = rng.standard_normal((ROWS, OUT))
    sizes = np.array(SIZES[name])
    group = np.repeat(np.arange(GROUPS), sizes)
    known = len(group)
    made, dx, dw = product_and_gradients(*(jnp.asarray(a, jnp.float32) for a in (x, weight)), jnp.asarray(sizes), ct)
    np.testing.assert_allclose(made[:known], np.einsum("ni,noi->no", x[:known], weight[group]), atol=1e-5)
    np.testing.assert_allclose(dx[:known], np.einsum("no,noi->ni", ct[:known], weight[group]), atol=1e-5)
    wanted = np.zeros_like(weight)
    np.add.at(wanted, group, ct[:known, :, None] * x[:known, None])
    np.testing.assert_allclose(dw, wanted, atol=2e-5)


def test_weight_gradients_of_half_precision_are_summed_in_float32() -> None:
    x, ct = jnp.full((ROWS, 2), 1, jnp.bfloat16), jnp.full((ROWS, 3), 1, jnp.bfloat16)
    weight, sizes = jnp.ones((1, 3, 2), jnp.bfloat16), jnp.array([ROWS])
    made, _, dw = product_and_gradients(x, weight, sizes, ct)
    assert made.dtype == dw.dtype == jnp.bfloat16
    # A sum in bfloat16 would stop at 256.
    np.testing.assert_array_equal(dw.astype(jnp.float32), 300)


def test_a_tpu_gets_its_own_operation_in_all_three_products() -> None:
    shapes = [(ROWS, 128), (GROUPS, 256, 128), (GROUPS,), (ROWS, 256)]
    like = [jax.ShapeDtypeStruct(s, jnp.int32 if len(s) == 1 else jnp.bfloat16) for s in shapes]
    text = product_and_gradients.trace(*like).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count('"chlo.ragged_dot"(') == 3
