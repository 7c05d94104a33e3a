"""The gated delta rule by chunks against the rule itself, and documents that share nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.models.delta_rule import DeltaTokens, chunked, recurrent, unit_inverse

B, T, K, G, H, V = 2, 75, 2, 2, 8, 6
# In both rows documents begin within chunks of 16, at the edge of one, and next to each other.
BEGINS = (0, 5, 32, 33, 60)


def tokens(seed: int = 0) -> DeltaTokens:
    rng = np.random.default_rng(seed)

    def unit(*shape: int) -> np.ndarray:
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    begins = np.zeros((B, T), bool)
    begins[:, list(BEGINS)] = True
    arrays = (unit(B, T, K, H), unit(B, T, K, H), rng.normal(size=(B, T, K, G, V)))
    faded = -rng.exponential(size=(B, T, K, G)) * rng.choice([0.01, 0.2, 3], size=(B, T, 1, 1))
    strength = rng.uniform(size=(B, T, K, G))
    return DeltaTokens(*(jnp.asarray(x, jnp.float32) for x in (*arrays, faded, strength)), jnp.asarray(begins))


def memory(seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, K, G, H, V)), jnp.float32)


by_chunks = jax.jit(chunked, static_argnums=2)


def rule_in_float64(x: DeltaTokens, memory: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The formula of the module's docstring, by plain loops."""
    q, k, v, decay, strength = (np.float64(y) for y in x[:5])
    kept, out = np.float64(memory), np.zeros((B, T, K, G, V))
    for b, t, head, group in np.ndindex(B, T, K, G):
        M = kept[b, head, group]
        if x.begins[b, t]:
            M[...] = 0
        M *= np.exp(decay[b, t, head, group])
        change = v[b, t, head, group] - M.T @ k[b, t, head]
        M += np.outer(k[b, t, head], strength[b, t, head, group] * change)
        out[b, t, head, group] = M.T @ q[b, t, head]
    return out, kept


@pytest.mark.parametrize("begins", [True, False], ids=["documents", "one document goes on"])
def test_both_forms_are_the_rule(begins: bool) -> None:
    x = tokens()
    x = x if begins else x._replace(begins=jnp.zeros_like(x.begins))
    expected = rule_in_float64(x, memory())
    for found in (jax.jit(recurrent)(x, memory()), by_chunks(x, memory(), 16)):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_the_gradients_of_both_forms_are_equal() -> None:
    x, begins = tokens()._replace(begins=None), tokens().begins

    def loss(rule, x: DeltaTokens, memory: jax.Array) -> jax.Array:
        return sum(jnp.sum(jnp.sin(3 * y)) for y in rule(x._replace(begins=begins), memory))

    def gradients(rule):
        return jax.jit(jax.grad(lambda x, m: loss(rule, x, m), (0, 1)))(x, memory())

    by_token, by_chunk = gradients(recurrent), gradients(lambda x, m: chunked(x, m, 16))
    for a, b in zip(jax.tree.leaves(by_token), jax.tree.leaves(by_chunk), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * float(np.abs(a).max()))


def test_another_document_changes_no_bit() -> None:
    """Nor where it stands in the same chunk; of its own tokens all change."""
    x, y = tokens(), tokens(seed=7)
    start, stop = BEGINS[1], BEGINS[2]
    inside = (np.arange(T) >= start) & (np.arange(T) < stop)
    other = DeltaTokens(
        *(jnp.where(inside.reshape(1, T, *[1] * (a.ndim - 2)), b, a) for a, b in zip(x, y, strict=True))
    )
    (before, left), (after, left_after) = by_chunks(x, memory(), 16), by_chunks(other, memory(), 16)
    same = np.asarray(before == after).all((0, 2, 3, 4))
    np.testing.assert_array_equal(same, ~inside)
    np.testing.assert_array_equal(left, left_after)


def test_a_document_alone_gives_the_same_bits_where_chunks_cut_it_alike() -> None:
    """Its first token finds nothing, whatever the memory holds."""
    x = tokens()
    start, stop = BEGINS[2] + 16, BEGINS[4]
    x = x._replace(begins=x.begins.at[:, BEGINS[3]].set(False).at[:, start].set(True))
    packed, _ = by_chunks(x, memory(), 16)
    real = np.arange(T) < stop - start

    def moved(y: jax.Array) -> jax.Array:
        """The document at the start of the row, and zeros behind it."""
        return jnp.where(real.reshape(1, T, *[1] * (y.ndim - 2)), jnp.roll(y, -start, axis=1), jnp.zeros((), y.dtype))

    first = DeltaTokens(*map(moved, x))
    alone, left = by_chunks(first, memory(), 16)
    np.testing.assert_array_equal(alone[:, : stop - start], packed[:, start:stop])
    # Padding may hold what it likes: it neither fades nor writes.
    behind = ~real.reshape(1, T, 1, 1)
    filled = first._replace(q=first.q + behind, k=first.k + behind, v=first.v + behind[..., None])
    np.testing.assert_array_equal(left, by_chunks(filled, memory(), 16)[1])


def test_keys_that_are_all_equal_lose_no_digits() -> None:
    """Powers of the matrix would reach 10^18 on the way to an inverse of ones."""
    lower = jnp.tril(jnp.ones((64, 64), jnp.float32), -1)
    inverse = jnp.eye(64) - jnp.eye(64, k=-1)
    np.testing.assert_allclose(jax.jit(unit_inverse)(lower), inverse, atol=1e-6)
