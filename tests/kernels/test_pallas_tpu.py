"""The Pallas TPU kernels by both interpreters, against the dense oracle: outputs, log-sum-exps and every gradient."""

from __future__ import annotations

import functools
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.attention import KeyGroups, PairForm, attention, pallas_tpu, reference
from rave_jax.kernels.attention.base import Terms
from rave_jax.kernels.attention.pallas_tpu.blocks import FACTS, BlockSizes, ByFacts, block_facts
from rave_jax.kernels.attention.pallas_tpu.operands import nested
from rave_jax.kernels.support import interpreted
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.kernels.drawn import (
    FLOATS,
    FORMS,
    MASKS,
    Dims,
    drawn_codes,
    random_codes,
    random_cotangents,
    random_key_bias,
    random_operands,
)

SMALL = BlockSizes((128, 128), (128, 128))


class Bucket(NamedTuple):
    """A padded shape with everything static: compiled once, whatever is drawn into it."""

    dims: Dims
    form: str | None
    dtype: str = "float32"
    key_bias: bool = False
    blocks: BlockSizes = SMALL


BUCKETS = {
    "log_gate": Bucket(Dims(2, 200, 300, 2, 2, 32, 24, 8), "log_gate"),
    "log_gate, half width": Bucket(Dims(1, 256, 384, 1, 3, 64, 64, 16), "log_gate", "bfloat16", key_bias=True),
    "tanh, blocks that differ": Bucket(
        Dims(1, 130, 400, 2, 2, 80, 80, 12), "tanh", key_bias=True, blocks=BlockSizes((256, 128), (128, 256))
    ),
    "linear": Bucket(Dims(1, 150, 150, 1, 2, 128, 128, 16), "linear", "bfloat16"),
    "linear, folded": Bucket(
        Dims(1, 150, 150, 2, 2, 32, 32, 8), "linear", blocks=BlockSizes((128, 128), (128, 128), fold_linear=True)
    ),
    "linear, folded, half width": Bucket(
        Dims(1, 150, 150, 1, 2, 64, 64, 16),
        "linear",
        "bfloat16",
        blocks=BlockSizes((128, 128), (128, 128), fold_linear=True),
    ),
    "centered_sigmoid, wide": Bucket(Dims(1, 200, 200, 2, 2, 256, 256, 64), "centered_sigmoid"),
    "plain": Bucket(Dims(1, 200, 300, 1, 3, 96, 96, 8), None, key_bias=True),
    "one query": Bucket(Dims(2, 1, 300, 2, 3, 32, 32, 8), "log_gate", key_bias=True),
    "eight queries, half width": Bucket(Dims(1, 8, 300, 1, 7, 64, 64, 64), "log_gate", "bfloat16"),
    "keys in chunks": Bucket(
        Dims(1, 140, 700, 1, 2, 32, 32, 8),
        "log_gate",
        key_bias=True,
        blocks=BlockSizes((128, 128), (128, 128), key_bytes=300_000),
    ),
}


@functools.cache
def both(name: str, interpret=True):
    """(kernels, oracle) of a bucket, each a compiled function of operands, codes and cotangents."""
    bucket = BUCKETS[name]
    form, scale = PairForm(bucket.form or "linear", limit=3.0), bucket.dims.h**-0.5

    def everything(run, q, k, v, bias, key_bias, codes, ct):
        def of(q, k, v, floats, key_bias):
            pair = None if bucket.form is None else bias._replace(**floats)
            return run(q, k, v, codes, Terms(pair, key_bias), form, scale)

        (out, lse), pull = jax.vjp(of, q, k, v, {n: getattr(bias, n) for n in FLOATS}, key_bias)
        return out, lse, pull((ct[0].astype(out.dtype), jnp.where(jnp.isfinite(lse), ct[1], 0.0)))

    kernels = functools.partial(pallas_tpu.attention, blocks=bucket.blocks, interpret=interpret)
    return jax.jit(functools.partial(everything, kernels)), jax.jit(functools.partial(everything, reference.attention))


def check(name: str, seed: int, mask: str, visual: float, interpret=True) -> None:
    bucket, rng = BUCKETS[name], np.random.default_rng(seed)
    d = bucket.dims
    q, k, v, bias = random_operands(rng, d, visual, bucket.dtype)
    key_bias = random_key_bias(rng, d) if bucket.key_bias else None
    codes = drawn_codes(rng, mask, d.B, d.T, d.S, int(rng.integers(1, d.S + 1)))
    ct = random_cotangents(rng, d)
    kernels, oracle = both(name, interpret)
    found = kernels(q, k, v, bias, key_bias, codes, ct)
    expected = oracle(*(x.astype(jnp.float32) for x in (q, k, v)), bias, key_bias, codes, ct)
    assert found[0].dtype == q.dtype and found[1].dtype == jnp.float32
    np.testing.assert_array_equal(np.isfinite(found[1]), np.isfinite(expected[1]))
    near = functools.partial(assert_near, tolerance=2e-5 if bucket.dtype == "float32" else 1.5e-2)
    jax.tree.map(near, found, expected)


def assert_near(found, expected, tolerance: float) -> None:
    """Both finite in the same places, and the error small beside the whole array (and beside one)."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    there = np.isfinite(expected)
    assert np.isfinite(found[there]).all()
    error = np.linalg.norm(found[there] - expected[there])
    assert error <= tolerance * (np.linalg.norm(expected[there]) + np.sqrt(there.sum()))


FAST = ("plain", "keys in chunks")
"""Each of the others takes 5 to 7 s to compile. Forms are functions that `xla` uses too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in BUCKETS]
)
def test_kernels_equal_the_dense_oracle_with_every_gradient(name):
    @given(st.integers(0, 2**31), st.sampled_from(MASKS), st.sampled_from((0.0, 0.6, 1.0)))
    @settings(max_examples=8)
    def holds(seed, mask, visual):
        check(name, seed, mask, visual)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("name", ("one query", "tanh, blocks that differ", "log_gate, half width", "linear, folded"))
def test_they_do_by_the_interpreter_that_watches_memory(name):
    check(name, seed=1, mask="packed", visual=0.6, interpret=pltpu.InterpretParams())


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
    jax.tree.map(functools.partial(assert_near, tolerance=1.5e-2), found, expected)


@pytest.mark.slow
def test_extreme_gates_lose_no_row():
    name = "keys in chunks"
    bucket, rng = BUCKETS[name], np.random.default_rng(4)
    d = bucket.dims
    q, k, v, bias = random_operands(rng, d, 1.0)
    bias = bias._replace(row=jnp.where(jnp.arange(d.T)[:, None] % 2, -60.0, 200.0) + bias.row)
    codes = drawn_codes(rng, "packed", d.B, d.T, d.S, d.S)
    kernels, oracle = both(name)
    key_bias, ct = random_key_bias(rng, d), random_cotangents(rng, d)
    found, expected = (run(q, k, v, bias, key_bias, codes, ct) for run in (kernels, oracle))
    jax.tree.map(functools.partial(assert_near, tolerance=2e-5), found, expected)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] * (form in ("tanh", "linear"))) for form in FORMS]
)
def test_a_zero_pair_changes_no_bit(form):
    d = Dims(1, 130, 200, 1, 2, 32, 32, 8)
    rng = np.random.default_rng(1)
    q, k, v, bias = random_operands(rng, d, 0.6)
    zero = bias._replace(w=bias.w * 0, row=bias.row * 0, key=bias.key * 0)
    codes = random_codes(rng, d.B, d.T, d.S)
    for a, b in zip(forward(q, k, v, codes, None, FORMS[0]), forward(q, k, v, codes, zero, form), strict=True):
        np.testing.assert_array_equal(a, b)


@functools.partial(jax.jit, static_argnames="form")
def forward(q, k, v, codes, bias, form):
    with interpreted():
        return attention(q, k, v, codes, bias, PairForm(form), scale=0.3, implementation="pallas_tpu")


@functools.cache
def split_operands():
    """Operands of 8 rows, and what makes outputs and gradients of them."""
    d = Dims(8, 130, 200, 2, 2, 32, 32, 8)
    rng = np.random.default_rng(2)
    q, k, v, bias = random_operands(rng, d, 0.6)
    key_bias, codes = random_key_bias(rng, d), random_codes(rng, d.B, d.T, d.S)
    ct = random_cotangents(rng, d)

    def gradients(implementation, q, k, v, floats, key_bias):
        def of(q, k, v, floats, key_bias):
            return attention(
                q, k, v, codes, bias._replace(**floats), scale=0.3, key_bias=key_bias, implementation=implementation
            )

        (out, lse), pull = jax.vjp(of, q, k, v, floats, key_bias)
        return out, lse, pull((ct[0], jnp.where(jnp.isfinite(lse), ct[1], 0.0)))

    return gradients, (q, k, v, {n: getattr(bias, n) for n in FLOATS}, key_bias)


@functools.cache
def on_one_device(implementation):
    gradients, operands = split_operands()
    with interpreted():
        return jax.jit(gradients, static_argnums=0)(implementation, *operands)


@pytest.mark.parametrize(
    ("implementation", "mesh"),
    [
        pytest.param("pallas_tpu", (1, 2, 2), marks=pytest.mark.slow),
        pytest.param("pallas_tpu", (2, 1, 4), marks=pytest.mark.slow),
        pytest.param("pallas_tpu", (1, 8, 1), marks=pytest.mark.slow),
        ("xla", (2, 2, 2)),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(implementation, mesh):
    """Rows and heads over devices: also where the mesh splits query heads finer than there are kv heads (4 and 2)."""
    gradients, operands = split_operands()
    with interpreted(), use_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: mesh[0] * mesh[1] * mesh[2]])):
        split = jax.jit(functools.partial(gradients, implementation))(*operands)
    alone = on_one_device(implementation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), split, alone)


@pytest.mark.slow
def test_key_groups_are_those_of_the_oracle_with_their_gradients():
    d = Dims(1, 130, 200, 1, 2, 32, 32, 8)
    rng = np.random.default_rng(3)
    q, k, v, bias = random_operands(rng, d, 0.6)
    codes = random_codes(rng, d.B, d.T, d.S)
    key_groups = KeyGroups(jnp.asarray(rng.integers(0, 2, (d.B, d.S)), jnp.int32), 3)
    ct = random_cotangents(rng, d, key_groups.count)

    def everything(implementation, q, k, v, floats):
        def of(q, k, v, floats):
            pair = bias._replace(**floats)
            return attention(q, k, v, codes, pair, scale=0.3, key_groups=key_groups, implementation=implementation)

        (out, lse), pull = jax.vjp(of, q, k, v, floats)
        return out, lse, pull((ct[0], jnp.where(jnp.isfinite(lse), ct[1], 0.0)))

    run = jax.jit(everything, static_argnums=0)
    operands = (q, k, v, {n: getattr(bias, n) for n in FLOATS})
    with interpreted():
        found = run("pallas_tpu", *operands)
    expected = run("reference", *operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), found, expected)


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


facts_of = jax.jit(block_facts, static_argnums=(3, 4))


@given(st.integers(0, 2**31), st.sampled_from(MASKS))
@settings(max_examples=40)
def test_what_is_said_of_blocks_is_never_wrong(seed, mask):
    """A pair that is not live may see nothing, a full one everything, and live blocks lie between first and last."""
    rng = np.random.default_rng(seed)
    B, T, S, block = 2, 24, 32, 4
    codes = drawn_codes(rng, mask, B, T, S, int(rng.integers(1, S + 1)))
    on_q, on_k = rng.random((B, T)) < 0.2, rng.random((B, S)) < 0.2
    facts_q, facts_k = (np.asarray(x) for x in facts_of(codes, on_q, on_k, block, block))
    visit = ByFacts(T // block, S // block)
    lo, hi, order, open_q, open_k = (np.asarray(x) for x in codes)
    allow = (lo[..., None] <= order[:, None]) & (order[:, None] <= hi[..., None])
    allow |= open_q[..., None] == open_k[:, None]
    for b, i, j in np.ndindex(B, T // block, S // block):
        rows, keys = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
        seen = allow[b, rows, keys]
        guards = visit.guards(facts_q, facts_k, b, i, j)
        assert guards.live() or not seen.any()
        assert not (guards.live() and guards.full()) or seen.all()
        assert bool(guards.gated()) == bool(on_q[b, rows].any() and on_k[b, keys].any())
        first, last = facts_q[(b * visit.num_q + i) * FACTS + 6 :][:2]
        assert not guards.live() or first <= j <= last


def test_causal_blocks_are_skipped_and_copied_no_more():
    T, block = 512, 128
    i = np.arange(T)
    codes = drawn_codes(np.random.default_rng(0), "packed", 1, T, T, T)._replace(
        lo=jnp.zeros((1, T), jnp.int32), hi=jnp.asarray(i[None], jnp.int32)
    )
    off = jnp.zeros((1, T), bool)
    facts = [np.asarray(x) for x in facts_of(codes, off, off, block, block)]
    visit = ByFacts(T // block, T // block)
    for i, j in np.ndindex(T // block, T // block):
        guards = visit.guards(*facts, 0, i, j)
        assert bool(guards.live()) == (j <= i) and bool(guards.full()) == (j < i)
        assert int(visit.key_block(facts[0], 0, i, j)) == min(i, j)


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
