"""The Pallas TPU kernels by both interpreters, against the dense oracle: outputs, log-sum-exps and every gradient."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention import attention, pallas_tpu
from rave_jax.kernels.attention.base import Terms
from rave_jax.kernels.attention.pallas_tpu.blocks import MOST_PAIRS, BlockSizes, ByFacts, block_facts
from rave_jax.kernels.attention.pallas_tpu.operands import nested
from rave_jax.kernels.support import interpreted
from tests.kernels.attention_backend import (
    EVERY_GRADIENT,
    BackendBesideTheOracle,
    Case,
    drawn_for,
    near_as_a_whole,
    program,
)
from tests.kernels.drawn import MASKS, Dims, drawn_codes, random_codes, random_cotangents, random_operands


def blocks(forward: tuple[int, int] = (128, 128), backward: tuple[int, int] = (128, 128), **more: Any) -> BlockSizes:
    return BlockSizes(forward, backward, **more)


def with_blocks(name: str, case: Case, *operands: Any, scale: float, key_bias: Any, interpret: Any = True) -> Any:
    """The kernels on one device, with the blocks of a case."""
    *rest, terms = operands
    return pallas_tpu.attention(*rest, Terms(terms, key_bias), scale, blocks=case.settings, interpret=interpret)


CASES = {
    # Keys come in chunks.
    "usual": Case(Dims(1, 140, 700, 1, 2, 32, 32, 8), key_bias=True, settings=blocks(key_bytes=300_000)),
    "log_gate": Case(Dims(2, 200, 300, 2, 2, 32, 24, 8), settings=blocks()),
    "log_gate, half width": Case(
        Dims(1, 256, 384, 1, 3, 64, 64, 16), dtype="bfloat16", key_bias=True, settings=blocks()
    ),
    "tanh, blocks that differ": Case(
        Dims(1, 130, 400, 2, 2, 80, 80, 12), "tanh", key_bias=True, settings=blocks((256, 128), (128, 256))
    ),
    "linear": Case(Dims(1, 150, 150, 1, 2, 128, 128, 16), "linear", "bfloat16", settings=blocks()),
    "linear, folded": Case(Dims(1, 150, 150, 2, 2, 32, 32, 8), "linear", settings=blocks(fold_linear=True)),
    "linear, folded, half width": Case(
        Dims(1, 150, 150, 1, 2, 64, 64, 16), "linear", "bfloat16", settings=blocks(fold_linear=True)
    ),
    "centered_sigmoid, wide": Case(Dims(1, 200, 200, 2, 2, 256, 256, 64), "centered_sigmoid", settings=blocks()),
    # Functions that are not RAVE's, alone and beside one of its forms.
    "distance": Case(Dims(2, 140, 300, 2, 2, 32, 24, 8), "distance", settings=blocks()),
    "two terms, one reads the score": Case(
        Dims(1, 140, 700, 1, 2, 32, 32, 5), "log_gate+bent_score", key_bias=True, settings=blocks(key_bytes=300_000)
    ),
    "three switches, half width": Case(
        Dims(1, 150, 300, 2, 2, 64, 64, 16), "linear+distance+bent_score", "bfloat16", settings=blocks(fold_linear=True)
    ),
    "soft cap, one query": Case(Dims(2, 1, 300, 2, 3, 32, 32, 8), "soft_cap+tanh", settings=blocks()),
    "plain": Case(Dims(1, 200, 300, 1, 3, 96, 96, 8), None, key_bias=True, settings=blocks()),
    "one query": Case(Dims(2, 1, 300, 2, 3, 32, 32, 8), key_bias=True, settings=blocks()),
    "eight queries, half width": Case(Dims(1, 8, 300, 1, 7, 64, 64, 64), dtype="bfloat16", settings=blocks()),
}


class TestPallasTpu(BackendBesideTheOracle):
    """An interpreted kernel takes 5 to 7 s to compile with its gradients. Forms are functions that `xla` uses too."""

    name = "pallas_tpu"
    call = staticmethod(with_blocks)
    cases = CASES
    slow = (
        *(f"{EVERY_GRADIENT}[{case}]" for case in CASES if case not in ("usual", "distance")),
        "test_a_zero_pair_changes_no_bit[tanh]",
        "test_a_zero_pair_changes_no_bit[linear]",
        "test_key_groups_are_what_their_keys_alone_give_and_merge_to_the_whole",
        "test_gradients_of_key_groups_are_the_oracles",
        "test_bfloat16_keeps_float32_statistics",
        "test_a_mesh_changes_nothing",
    )

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name",
        (
            "one query",
            "tanh, blocks that differ",
            "log_gate, half width",
            "linear, folded",
            "two terms, one reads the score",
        ),
    )
    def test_the_interpreter_that_watches_memory_finds_the_same(self, name):
        case = self.cases[name]
        given_ = drawn_for(case, np.random.default_rng(1), "packed", 0.6)
        call = functools.partial(with_blocks, interpret=pltpu.InterpretParams())
        self.compare(case, given_, program(call, self.name, case)(given_))


@pytest.fixture
def optimised():
    """Compiled as users compile, and not as these tests do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_one_block_of_bfloat16_has_gradients_on_a_cpu_too():
    """Its products were bfloat16 ones that XLA's CPU code has not."""
    rng, d = np.random.default_rng(3), Dims(1, 128, 128, 1, 7, 128, 128, 64)
    q, k, v, _ = random_operands(rng, d, 0.6, "bfloat16")
    codes, (d_out, _) = drawn_codes(rng, "packed", d.B, d.T, d.S, d.S), random_cotangents(rng, d)

    def gradients(implementation, *operands):
        def loss(q, k, v):
            out, _ = attention(q, k, v, codes, scale=0.1, implementation=implementation)
            return jnp.sum(d_out * out)

        return jax.grad(loss, (0, 1, 2))(*operands)

    with interpreted():
        found = jax.jit(gradients, static_argnums=0)("pallas_tpu", q, k, v)
    expected = gradients("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    jax.tree.map(functools.partial(near_as_a_whole, tolerance=1.5e-2), found, expected)


@given(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=200)
def test_blocks_that_differ_pad_no_more_than_the_smaller_one_needs(n, forward, backward):
    """The same number of the smaller blocks, each smaller by whole lanes if that will do."""
    sizes = forward * 128, backward * 128
    padded, cut = nested(n, *sizes)
    least = min(sizes)
    assert n <= padded <= -(-n // least) * least
    assert padded < n + 128 * -(-n // least)
    for size, block in zip(sizes, cut, strict=True):
        assert block <= size and block % 128 == 0 and padded % block == 0
    assert max(cut) % min(cut) == 0
    assert min(cut) > least // 2 or padded == min(cut)


def test_lengths_that_fit_no_block_are_not_padded_to_a_common_multiple():
    assert nested(640, 1024, 512) == (768, (768, 384))
    assert nested(4096, 1024, 512) == (4096, (1024, 512))
    assert nested(200, 512, 512) == (256, (256, 256))


facts_of = jax.jit(block_facts, static_argnums=(3, 4, 5))


@given(st.integers(0, 2**31), st.sampled_from(MASKS), st.sampled_from((0, MOST_PAIRS)))
@settings(max_examples=40)
def test_what_is_said_of_blocks_is_never_wrong(seed, mask, most_pairs):
    """A pair that is not live may see nothing, a full one everything, and live blocks lie between first and last."""
    rng = np.random.default_rng(seed)
    B, T, S, block = 2, 24, 32, 4
    codes = drawn_codes(rng, mask, B, T, S, int(rng.integers(1, S + 1)))
    # Two switches, each a bit.
    on_q, on_k = ((rng.random((2, B, n)) < 0.1) * np.array([1, 2])[:, None, None] for n in (T, S))
    on_q, on_k = (x.sum(0).astype(np.int32) for x in (on_q, on_k))
    facts = [np.asarray(x) for x in facts_of(codes, on_q, on_k, block, block, most_pairs)]
    assert len(facts) == (2 if most_pairs == 0 else 1)
    visit = ByFacts(T // block, S // block)
    lo, hi, order, open_q, open_k = (np.asarray(x) for x in codes)
    allow = (lo[..., None] <= order[:, None]) & (order[:, None] <= hi[..., None])
    allow |= open_q[..., None] == open_k[:, None]
    for b, i, j in np.ndindex(B, T // block, S // block):
        rows, keys = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
        seen = allow[b, rows, keys]
        guards = visit.guards(facts, b, i, j)
        assert guards.live() or not seen.any()
        assert not (guards.live() and guards.full()) or seen.all()
        for bit in (1, 2):
            assert bool(guards.on() & bit) == bool((on_q[b, rows] & bit).any() and (on_k[b, keys] & bit).any())
        at, of_row = visit.key_block(facts, b, i, j), [visit.key_block(facts, b, i, n) for n in (0, S // block - 1)]
        assert at == np.clip(j, *of_row) and (at == j or not guards.live())


@pytest.mark.parametrize("most_pairs", [0, MOST_PAIRS])
def test_causal_blocks_are_skipped_and_copied_no_more(most_pairs):
    T, block = 512, 128
    i = np.arange(T)
    codes = drawn_codes(np.random.default_rng(0), "packed", 1, T, T, T)._replace(
        lo=jnp.zeros((1, T), jnp.int32), hi=jnp.asarray(i[None], jnp.int32)
    )
    off = jnp.zeros((1, T), jnp.int32)
    facts = [np.asarray(x) for x in facts_of(codes, off, off, block, block, most_pairs)]
    visit = ByFacts(T // block, T // block)
    for i, j in np.ndindex(T // block, T // block):
        guards = visit.guards(facts, 0, i, j)
        assert bool(guards.live()) == (j <= i) and bool(guards.full()) == (j < i)
        assert int(visit.key_block(facts, 0, i, j)) == min(i, j)


def test_without_a_tpu_it_is_refused_by_name():
    d = Dims(1, 8, 8, 1, 1, 8, 8, 8)
    rng = np.random.default_rng(0)
    q, k, v, _ = random_operands(rng, d, 0.6)
    codes = random_codes(rng, d.B, d.T, d.S)
    with pytest.raises(ValueError, match="cannot serve attention: its kernels run on TPUs, and the devices are cpu"):
        attention(q, k, v, codes, scale=1.0, implementation="pallas_tpu")
    with interpreted(), pytest.raises(ValueError, match="v is bfloat16, expected float32 as q"):
        attention(q, k, v.astype(jnp.bfloat16), codes, scale=1.0, implementation="pallas_tpu")
    with interpreted(), pytest.raises(ValueError, match="must be bfloat16 or float32, not float16"):
        half = (x.astype(jnp.float16) for x in (q, k, v))
        attention(*half, codes, scale=1.0, implementation="pallas_tpu")
