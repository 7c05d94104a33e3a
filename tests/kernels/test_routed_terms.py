"""Rows of score terms over chosen regions: a tile of gathered queries and keys is the stated one, and so are gradients.

Plain jnp, which the TPU kernels trace into theirs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.kernels.attention import Terms
from rave_jax.kernels.attention.base import group_heads, tile_bias
from rave_jax.kernels.attention.score import LOG2E
from rave_jax.kernels.routed.pallas_tpu.terms import RowTerms, Sides, without_key_bias
from tests.kernels.drawn import PairBias
from tests.kernels.score_terms import terms_of

T, S, K, G, R, ROWS = 4, 5, 2, 3, 3, 8
NAMES = "bent_score+tanh+distance+linear"


def operands() -> tuple[dict[str, Any], dict[str, Any]]:
    """Floats, and switches."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=(1, *shape)), jnp.float32)

    floats = {"u": normal(T, K * G, R), "w": normal(S, K, R), "row": normal(T, K * G), "key": normal(S, K)}
    floats |= {"gain": normal(K * G)[0], "per_key": normal(S, K * G)}
    return floats, {"query_on": normal(T, K * G) > -0.5, "key_on": normal(S)[..., :] > -0.5}


def made(floats: dict[str, Any], switches: dict[str, Any]) -> Terms:
    pair = {name: x for name, x in floats.items() if name != "per_key"}
    return without_key_bias(Terms(terms_of(PairBias(**pair, **switches), NAMES), floats["per_key"]), T, K)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_tile_and_its_gradients_are_the_stated_ones(dtype: str, error: float) -> None:
    floats, switches = operands()
    dot, d_bias = (jax.random.normal(jax.random.key(n), (1, K, G, T, S)) for n in (0, 1))
    rows = RowTerms.of(made(floats, switches), dtype)
    assert rows.reads_dot and 0 < rows.numbers <= 128

    def stated(floats: dict[str, Any], dot: Any) -> Any:
        # The key bias is added by name: it is no term there.
        terms = made(floats, switches).parts[:-1]
        bias = sum((tile_bias(term, dot, K) for term in terms), jnp.zeros_like(dot))
        return bias + group_heads(jnp.moveaxis(floats["per_key"], 1, 2)[:, None], K).reshape(1, K, G, 1, S)

    def packed(floats: dict[str, Any]) -> Any:
        terms = made(floats, switches)
        of_keys = rows.key_rows(terms, (1, S, K))
        return rows.query_rows(terms, (1, T, K * G), T, K, ROWS), jnp.moveaxis(of_keys, 2, 1)

    def tile(x: Any) -> Any:
        """[G,T,S] of a kv head as rows of queries: heads, filled up with the last one, one query below the other."""
        return jnp.pad(jnp.moveaxis(x, 0, 1), [(0, 0), (0, ROWS - G), (0, 0)], mode="edge").reshape(T * ROWS, S)

    @jax.jit
    def by_rows(floats: dict[str, Any]) -> Any:
        (queries, keys), pull = jax.vjp(packed, floats)
        d_queries, d_keys, found = jnp.zeros_like(queries), jnp.zeros_like(keys), []
        real = jnp.arange(T * ROWS) % ROWS < G
        d_dots = []
        for n in range(K):
            mine = queries[0, n].reshape(T * ROWS, -1), keys[0, n]
            found.append(Sides(rows, *mine, False, jnp.dtype(dtype)).shift(tile(dot[0, n])))
            turned = Sides(rows, *mine, True, jnp.dtype(dtype))
            added = turned.added(tile(dot[0, n]).T, exact=True)
            d = (tile(d_bias[0, n]) * real[:, None]).T
            fields = [slope(d) for slope in added.slopes]
            d_dots.append(sum(of.dot for of in fields if of.dot is not None).T)
            of_queries, of_keys = turned.gradients(fields)
            d_queries = d_queries.at[0, n].set(of_queries.reshape(queries.shape[2:]))
            d_keys = d_keys.at[0, n].set(of_keys)
            found[-1] = found[-1], added.shift.T
        return found, d_dots, pull((d_queries, d_keys))[0]

    expected, pull = jax.vjp(jax.jit(stated), floats, dot)
    d_floats, d_dot = pull(d_bias)
    found, d_dots, grads = by_rows(floats)
    for n in range(K):
        for shift in found[n]:
            # Split channels lose the product of two rests alone.
            np.testing.assert_allclose(shift, tile(expected[0, n]) * LOG2E, atol=1e-3)
        real = np.arange(T * ROWS) % ROWS < G
        np.testing.assert_allclose(d_dots[n][real], tile(d_dot[0, n])[real], atol=error, rtol=error)
    for name, x in d_floats.items():
        np.testing.assert_allclose(grads[name], x, atol=10 * error, rtol=error, err_msg=name)
        assert bool((x != 0).any()), name
