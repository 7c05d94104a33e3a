"""Bytes that a grid copies: by hand, against a plain walk, and for a kernel of jax's own."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from rave_jax.tools.tpu import Operand, copied_bytes


def test_a_block_is_copied_when_its_index_changes() -> None:
    grid = (2, 3)
    a = Operand("a", (16, 128), 4, (8, 128), lambda i, j: (i, 0))  # stays while j runs: 2 copies
    b = Operand("b", (24, 128), 4, (8, 128), lambda i, j: (j, 0))  # 0 1 2 0 1 2: 6
    c = Operand("c", (8, 128), 2, (8, 128), lambda i, j: (0, 0))  # never changes: 1
    d = Operand("d", (24, 128), 4, (8, 128), lambda i, j: (jnp.where(i == 0, j, 2), 0))  # 0 1 2 2 2 2: 3
    e = Operand("e", (2, 3, 128), 4, (None, None, 128), lambda i, j: (i, j, 0))  # 6, of 128 numbers
    block = 8 * 128
    assert copied_bytes(grid, [a, b, c, d, e]) == {
        "a": 2 * block * 4, "b": 6 * block * 4, "c": block * 2, "d": 3 * block * 4, "e": 6 * 128 * 4
    }  # fmt: skip


def test_prefetched_scalars_say_which_block() -> None:
    chosen = np.array([[3, 3, 1], [1, 0, 0]], np.int32)  # in the order of the grid: 3 3 1 1 0 0
    x = Operand("x", (32, 128), 2, (8, 128), lambda i, j, index: (index[i, j], 0))
    assert copied_bytes((2, 3), [x], [chosen]) == {"x": 3 * 8 * 128 * 2}


def test_a_block_over_the_edge_counts_with_what_lies_inside() -> None:
    x = Operand("x", (20, 128), 4, (8, 128), lambda i: (i, 0))
    assert copied_bytes((3,), [x]) == {"x": 20 * 128 * 4}


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(IndexError, match=r"x: block 2 of axis 0 lies outside at grid step \(1, 0\)"):
        copied_bytes((2, 2), [Operand("x", (16, 128), 4, (8, 128), lambda i, j: (2 * i, 0))])
    with pytest.raises(IndexError, match="block -1"):
        copied_bytes((2,), [Operand("x", (16, 128), 4, (8, 128), lambda i: (i - 1, 0))])
    with pytest.raises(ValueError, match="an index of 1 for a block of 2"):
        copied_bytes((2,), [Operand("x", (16, 128), 4, (8, 128), lambda i: (i,))])
    same = Operand("x", (16,), 4, (8,), lambda i: (i,))
    with pytest.raises(ValueError, match="one name"):
        copied_bytes((2,), [same, same])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_any_grid_equals_a_plain_walk(grid: list[int], data: st.DataObject) -> None:
    table = np.array(data.draw(st.lists(st.integers(0, 4), min_size=64, max_size=64)), np.int32).reshape(4, 4, 4)
    rows, columns, depth = [*grid, 1, 1][:3]
    table = table[:rows, :columns, :depth].reshape(grid)
    copied, before = 0, None
    for place in itertools.product(*map(range, grid)):
        if (now := int(table[place])) != before:
            copied, before = copied + min(8, 36 - 8 * now) * 2, now
    x = Operand("x", (36,), 2, (8,), lambda *args: (args[-1][args[:-1]],))
    assert copied_bytes(grid, [x], [table]) == {"x": copied}


def test_splash_attention_skips_the_copies_of_what_it_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its causal mask skips 6 of 16 tiles, and the prefetched tables say which block comes next instead."""
    heads, length, size = 3, 512, 128
    calls: list[Any] = []

    def recorded(kernel: Any, *, grid_spec: Any, out_shape: Any, **rest: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append((grid_spec, args))
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out_shape)

        return call

    monkeypatch.setattr(pl, "pallas_call", recorded)
    blocks = splash.BlockSizes(block_q=size, block_kv=size)
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads), block_sizes=blocks
    )
    q, kv = jnp.zeros((heads, length, size), jnp.bfloat16), jnp.zeros((length, size), jnp.bfloat16)
    jax.eval_shape(kernel, q, kv, kv)
    spec, args = calls[0]
    assert spec.grid == (heads, 4, 4)
    reads = [Operand.of(name, spec.in_specs[n], args[3 + n]) for n, name in enumerate(("q", "k"))]
    copied = copied_bytes(spec.grid, reads, [kernel.fwd_mask_info.data_next, kernel.fwd_mask_info.block_mask])
    block = size * size * 2
    assert copied["q"] == heads * 4 * block, "once for each row of tiles"
    # Rows of tiles read blocks 0; 0 1; 0 1 2; 0 1 2 3. Skipped tiles name block 0, which
    # the next row needs first; the second row finds it there from the first.
    assert copied["k"] == heads * (1 + 2 + 3 + 4 - 1) * block
