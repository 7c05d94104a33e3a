"""Chunked cross-entropy equals the dense one, and never makes a float32 [B,T,V] array."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.models.layers import LowRank
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from rave_jax.training.objective import chunked_cross_entropy

V, D = 17, 6
Z = 0.1
"""Coefficient of the z-loss; large, so that its gradient counts."""


loss_of = jax.jit(chunked_cross_entropy, static_argnums=(4, 5))


def arrays(seed: int, B: int, T: int, dtype=jnp.float32, V: int = V, D: int = D):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(3 * rng.standard_normal((B, T, D)), dtype)
    head = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.random((B, T)) * (np.arange(T) % 3 > 0), jnp.float32)
    return hidden, head, targets, weights


def dense(hidden, head, targets, weights):
    logits = jnp.einsum("BTD,VD->BTV", hidden.astype(jnp.float32), head)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    z = Z * (jax.nn.logsumexp(logits, -1) ** 2 * weights).sum()
    return z - (chosen * weights).sum(), ((logits.argmax(-1) == targets) * weights).sum(), weights.sum(), z


@pytest.mark.parametrize(("T", "chunk"), [(1, 4), (8, 1), (8, 4), (8, 8), (11, 4), (11, 20)])
def test_equals_dense(T, chunk):
    given_arrays = arrays(T, 2, T)
    found = loss_of(*given_arrays, chunk, Z)
    np.testing.assert_allclose(found, jax.jit(dense)(*given_arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 5, 12])
def test_gradients_equal_dense(chunk):
    given_arrays = arrays(1, 3, 12)
    ours = jax.jit(jax.grad(lambda *a: chunked_cross_entropy(*a, chunk, Z).loss, argnums=(0, 1)))(*given_arrays)
    theirs = jax.jit(jax.grad(lambda *a: dense(*a)[0], argnums=(0, 1)))(*given_arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "vocab"), [(MeshConfig(data=2, fsdp=2, tensor=2), 24), (MeshConfig(fsdp=4, tensor=2), 25)]
)
def test_a_mesh_gives_the_loss_and_the_gradients_of_one_device(mesh, vocab):
    """With the vocabulary split and, where its size does not divide, whole."""
    given_arrays = arrays(4, 8, 11, V=vocab, D=8)

    def of(*arrays):
        sums = chunked_cross_entropy(*arrays, 4, Z)
        return sums.loss / 3, sums

    program = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)
    (_, wanted), wanted_gradients = jax.jit(program)(*given_arrays)
    with use_mesh(make_mesh(mesh)):
        # A function of its own: the mesh is no part of what jit knows a program by.
        (_, found), gradients = jax.jit(lambda *a: program(*a))(*given_arrays)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one device", "mesh"])
def test_an_adapter_of_the_head_is_part_of_the_loss_and_of_the_gradients(mesh):
    """Equal to the dense loss of the sum of both, with gradients of hidden states, head and both factors."""
    (hidden, head, targets, weights), rng = arrays(6, 8, 11, V=24, D=8), np.random.default_rng(0)
    adapter = LowRank(*(jnp.float32(rng.standard_normal(shape)) for shape in ((3, 8), (24, 3))))

    def ours(hidden, head, adapter):
        return chunked_cross_entropy(hidden, head, targets, weights, 4, Z, adapter).loss

    def theirs(hidden, head, adapter):
        return dense(hidden, head + adapter.up @ adapter.down, targets, weights)[0]

    wanted = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1, 2)))(hidden, head, adapter)
    with contextlib.nullcontext() if mesh is None else use_mesh(make_mesh(mesh)):
        found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(hidden, head, adapter)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_of_equal_logits_on_several_devices_the_first_is_the_guess():
    hidden, head, targets, weights = arrays(5, 8, 4, V=24, D=8)
    with use_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        found = jax.jit(lambda *a: chunked_cross_entropy(*a, 4))(hidden, 0 * head, 0 * targets, weights)
    assert found.correct == found.weight > 0


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
