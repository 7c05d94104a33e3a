"""What the Pallas kernels declare that they copy is what their grids copy where every block is visited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from rave_jax.kernels.attention import MaskCodes, Terms
from rave_jax.kernels.attention.pallas_tpu import operands
from rave_jax.kernels.attention.pallas_tpu.backward import backward
from rave_jax.kernels.attention.pallas_tpu.blocks import BlockSizes, block_facts
from rave_jax.kernels.attention.pallas_tpu.forward import forward
from rave_jax.tools.tpu import Operand, copied_bytes
from tests.kernels.drawn import PairBias
from tests.kernels.score_terms import terms_of


class Called(Exception):
    """Instead of a Pallas call: what it declared, what its grid copies, and what comes whole."""


def count(grid_spec: Any, out_shape: Any, declared: Any, scalars: Any, inputs: Any) -> tuple[int, int]:
    both = [*zip(grid_spec.in_specs, inputs, strict=True), *zip(grid_spec.out_specs, out_shape, strict=True)]
    found = [Operand.of(str(n), spec, x) for n, (spec, x) in enumerate(both) if spec.block_shape is not None]
    whole = sum(x.size * x.dtype.itemsize for spec, x in both if spec.block_shape is None)
    return declared.bytes_accessed, sum(copied_bytes(grid_spec.grid, found, scalars).values()) + whole


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def pallas_call(
        _kernel: Any, *, grid_spec: Any, out_shape: Any, cost_estimate: Any, **_: Any
    ) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise Called(count(grid_spec, out_shape, cost_estimate, args[:1], args[1:]))

        return run

    monkeypatch.setattr(pl, "pallas_call", pallas_call)


SHAPES = {
    "many of each": {"T": 512, "S": 768},
    "one block of queries": {"T": 128, "S": 512},
    "one block of keys": {"T": 512, "S": 256},
    "one of each": {"T": 8, "S": 128},
}


facts_of = jax.jit(block_facts, static_argnums=(3, 4))


@pytest.mark.parametrize("names", [None, "log_gate", "centered_sigmoid+distance+bent_score"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "kv_heads"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)])
def test_declared_bytes_are_those_copied(instead: None, names: Any, shape: str, rows: int, kv_heads: int) -> None:
    B, K, H, h, r = rows, kv_heads, 3 * kv_heads, 64, 16
    T, S = SHAPES[shape]["T"], SHAPES[shape]["S"]
    q, k, v = (jax.ShapeDtypeStruct((B, n, m, h), jnp.bfloat16) for n, m in ((T, H), (S, K), (S, K)))
    shapes = ((B, T, H, r), (B, S, K, r), (B, T, H), (B, S, K), (H,))
    parts: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gate = PairBias(*parts, None, None)
    gate = gate._replace(query_on=jax.ShapeDtypeStruct((B, T, H), bool), key_on=jax.ShapeDtypeStruct((B, S), bool))
    parts = () if names is None else jax.eval_shape(lambda gate: terms_of(gate, names), gate)
    terms = Terms(parts, jax.ShapeDtypeStruct((B, S, H), jnp.float32))
    blocks = BlockSizes((128, 256), (256, 128))
    call = operands.make_call(q, k, v, terms, 1.0, blocks, interpret=False)
    packed = jax.eval_shape(lambda *args: operands.pack(*args, call), q, k, v, terms)
    at = (jnp.zeros((B, call.T), jnp.int32), jnp.zeros((B, call.S), jnp.int32))
    codes = MaskCodes(at[0], at[0], at[1], at[0] - 1, at[1] - 2)  # everyone sees everyone
    on = tuple(-jnp.ones(x.shape, jnp.int32) for x in at)
    d_out = jax.ShapeDtypeStruct((B, K, call.G, call.T, call.c), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((B, K, call.padded_group, call.T), jnp.float32)
    for run, sizes, more in ((forward, call.forward, ()), (backward, call.backward, (d_out, row, row))):
        facts = facts_of(codes, *on, *sizes)
        with pytest.raises(Called) as made:
            run(packed, operands.pack_codes(codes), facts, *more, call)
        declared, copied = made.value.args[0]
        assert declared == copied, run.__name__
