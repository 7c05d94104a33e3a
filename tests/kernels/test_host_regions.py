"""Regions in host memory: what is put there comes back, and attention over them is that over regions on the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.kernels.routed import HostRegions, Stack, host
from tests.kernels.test_gather import operands, run

L, B, K, R, m, h = 3, 2, 2, 6, 5, 16
NUMBERS = np.random.default_rng(0).integers(-99, 99, (L, B, K, R, m, h))
_put = jax.jit(lambda held, row, new: held.with_row(row, new), donate_argnums=0)


def held(numbers: Any, dtype: Any) -> HostRegions:
    """The numbers [L,B,K,R,m,h] in host memory."""
    kept = jax.jit(lambda: host.empty(numbers.shape, jnp.dtype(dtype)))()
    for row in range(numbers.shape[1]):
        kept = _put(kept, jnp.int32(row), jnp.asarray(numbers[:, row], dtype))
    return kept


def same(found: jax.Array, expected: Any) -> None:
    assert found.sharding.memory_kind == "device"
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_put_there_comes_back(dtype: str) -> None:
    kept = held(NUMBERS, dtype)
    assert kept.shape == NUMBERS.shape and kept.dtype == dtype and kept.tiles.sharding.memory_kind == "pinned_host"
    same(jax.jit(HostRegions.of_layer)(kept, jnp.int32(1)), NUMBERS[1])
    same(jax.jit(lambda kept, rows: kept.of_rows(rows, 4))(kept, jnp.array([1, 0, 7])), NUMBERS[:, [1, 0, 1], :, :4])
    index, count = jnp.array([[[5, 0, 3], [1, 1, 2]], [[4, 4, 4], [0, 5, 5]]]), jnp.array([[3, 0], [1, 9]])
    found = jax.jit(HostRegions.listed)(kept, jnp.int32(2), index, count)
    listed = np.stack([[NUMBERS[2, b, k][index[b, k]] for k in range(K)] for b in range(B)])
    same(found, np.where((np.arange(3) < count[..., None])[..., None, None], listed, 0))


def test_a_row_is_replaced_in_place_and_no_other() -> None:
    kept = held(NUMBERS, "float32")
    after = _put(kept, jnp.int32(1), -jnp.ones((L, K, 4, m, h)))
    assert kept.tiles.is_deleted() and after.tiles.sharding.memory_kind == "pinned_host"
    expected = NUMBERS.copy()
    expected[:, 1, :, :4] = -1
    same(jax.jit(lambda kept: kept.of_rows(jnp.arange(B), R))(after), expected)


@pytest.mark.parametrize(("kind", "apart"), [("float32", False), pytest.param("int8", True, marks=pytest.mark.slow)])
def test_attention_is_that_over_regions_on_the_device(kind: str, apart: bool) -> None:
    given, on_host, on_device = operands(8, apart, "tanh"), {}, {}
    for name in "kv":
        stack, scale = jnp.stack([given[name] * 0 - 9, given[name]]), None
        if kind == "int8":
            stack = jnp.round(jnp.clip(20 * stack, -127, 127)).astype(jnp.int8)
            scale = jnp.asarray(np.random.default_rng(1).random(stack.shape[:-1]), jnp.float32) / 16
        on_device[name] = Stack(stack, scale, jnp.int32(1))
        on_host[name] = Stack(held(np.asarray(stack), kind), scale, jnp.int32(1))
    expected = run(**given | on_device, implementation="xla")
    for implementation in ("xla", "reference"):
        for x, y in zip(run(**given | on_host, implementation=implementation), expected, strict=True):
            # The same numbers in the same order, but how a compiler rounds their sums is its own affair.
            np.testing.assert_allclose(x, y, atol=2e-5)
    with pytest.raises(
        ValueError, match="cannot serve attention to chosen regions: the regions lie in host memory; expected auto, or"
    ):
        run(**given | on_host, implementation="pallas_tpu")
