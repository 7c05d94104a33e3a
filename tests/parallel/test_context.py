"""Context parallelism: how the tokens of a row are dealt out to devices, and what moves for it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.parallel import context
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import named_sharding, use_mesh


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_every_device_gets_the_same_share_of_a_causal_map(parts: int) -> None:
    order = context.dealt_order(48, parts)
    assert sorted(order) == list(range(48))
    keys_met = (order + 1).reshape(parts, -1).sum(axis=1)
    assert len(set(keys_met.tolist())) == 1 or parts == 1


@pytest.mark.parametrize("sizes", [{"context": 2, "tensor": 2, "fsdp": 2}, {"context": 8, "fsdp": 1}], ids=str)
def test_tokens_are_dealt_out_and_come_back_by_two_exchanges(sizes: dict[str, int]) -> None:
    """What a device keeps of the other mesh axes does not move."""
    mesh = make_mesh(MeshConfig(**sizes))
    x = np.arange(4 * 32 * 2 * 3, dtype=np.float32).reshape(4, 32, 2, 3)
    order = context.dealt_order(32, sizes["context"])
    with use_mesh(mesh):
        split = jax.device_put(x, named_sharding(("batch", "length", "kv_heads", None), x.shape, mesh))
        program = jax.jit(lambda x: context.deal(x)).lower(split).compile()
        dealt = program(split)
        back = jax.jit(lambda x: context.gather_in(x))(dealt)
        assert context.dealt(jnp.asarray(x)).tolist() == x[:, order].tolist()
    np.testing.assert_array_equal(dealt, x[:, order])
    np.testing.assert_array_equal(back, x)
    moved = re.findall(r"(all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)\(", program.as_text())
    assert moved == ["collective-permute"] * 2


def test_without_a_context_axis_nothing_is_done() -> None:
    x = jnp.ones((2, 6))
    assert context.ways() == 1
    assert context.deal(x) is x and context.gather_in(x) is x and context.dealt(x) is x


def test_rows_that_cannot_be_dealt_out_are_refused_by_their_field() -> None:
    context.check_tokens(7, 1, "data.tokens")
    context.check_tokens(24, 4, "data.tokens")
    with pytest.raises(ConfigError, match=r"data\.tokens is 20, expected a multiple of 8: .* mesh\.context 4"):
        context.check_tokens(20, 4, "data.tokens")
