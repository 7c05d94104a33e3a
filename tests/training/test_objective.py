"""Chunked cross-entropy equals the dense one, and never makes a float32 [B,T,V] array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.training.objective import chunked_cross_entropy

V, D = 17, 6


loss_of = jax.jit(chunked_cross_entropy, static_argnums=(4, 5))


def arrays(seed: int, B: int, T: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(3 * rng.standard_normal((B, T, D)), dtype)
    head = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.random((B, T)) * (np.arange(T) % 3 > 0), jnp.float32)
    return hidden, head, targets, weights


def dense(hidden, head, targets, weights):
    logits = jnp.einsum("BTD,VD->BTV", hidden.astype(jnp.float32), head)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    z = (jax.nn.logsumexp(logits, -1) ** 2 * weights).sum()
    return -(chosen * weights).sum(), ((logits.argmax(-1) == targets) * weights).sum(), weights.sum(), z


@pytest.mark.parametrize(("T", "chunk"), [(1, 4), (8, 1), (8, 4), (8, 8), (11, 4), (11, 20)])
def test_equals_dense(T, chunk):
    given_arrays = arrays(T, 2, T)
    found = loss_of(*given_arrays, chunk, True)
    np.testing.assert_allclose(found, jax.jit(dense)(*given_arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 5, 12])
def test_gradients_equal_dense(chunk):
    given_arrays = arrays(1, 3, 12)

    def both(sums):
        return sums[0] + 0.1 * sums[3]

    ours = jax.jit(jax.grad(lambda *a: both(chunked_cross_entropy(*a, chunk, True)), argnums=(0, 1)))(*given_arrays)
    theirs = jax.jit(jax.grad(lambda *a: both(dense(*a)), argnums=(0, 1)))(*given_arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_huge_logits_stay_finite():
    hidden, head, targets, weights = arrays(2, 2, 8)
    of = jax.jit(jax.value_and_grad(lambda h: chunked_cross_entropy(h, head, targets, weights, 4).loss))
    sums, grad = of(1e4 * hidden)
    assert np.isfinite(sums)
    assert np.isfinite(grad).all()


def shapes_in(jaxpr) -> set[tuple[tuple[int, ...], str]]:
    """Shape and dtype of every value that a program makes, inner programs included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {(v.aval.shape, str(v.aval.dtype)) for v in equation.outvars if hasattr(v.aval, "shape")}
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= shapes_in(inner)
    return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_array_of_all_logits(dtype):
    B, T, chunk = 2, 32, 8
    given_arrays = arrays(0, B, T, dtype)
    program = jax.make_jaxpr(jax.grad(lambda *a: chunked_cross_entropy(*a, chunk).loss, argnums=(0, 1)))(*given_arrays)
    sizes = {(np.prod(shape), dtype) for shape, dtype in shapes_in(program.jaxpr) if V in shape}
    assert (B * chunk * V, "float32") in sizes, "the walk found no logits at all"
    assert max(size for size, _ in sizes) == B * chunk * V


@pytest.mark.parametrize("wrong", [V, -1])
def test_an_id_that_the_vocabulary_does_not_have_is_no_loss(wrong):
    hidden, head, targets, weights = arrays(0, 2, 8)
    assert np.isnan(loss_of(hidden, head, targets.at[1, 3].set(wrong), weights + 1, 4).loss)
