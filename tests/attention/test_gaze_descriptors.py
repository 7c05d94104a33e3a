"""Descriptors of regions: their formulas, whole and in parts, and regions with fewer keys than others."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax.attention import (
    AttentionDims,
    Features,
)
from rave_jax.attention.gaze import descriptors
from rave_jax.attention.masks import causal_codes
from rave_jax.batch import TokenInfo
from tests.attention.packed import features
from tests.attention.test_gaze import T, gaze, rows

NAMES = ("mean", "min_max", "spread", "learned")


@functools.partial(jax.jit, static_argnames=("name", "R"))
def described(name, k, logits, region, R):
    summary = descriptors.summarise(name, k, logits, region, R)
    return descriptors.describe(name, summary, (*region.shape[:1], R, *k.shape[2:]), jnp.zeros((1, R), jnp.int32))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 12))
def test_descriptors_are_their_formulas_whole_or_in_parts(name, seed: int, cut: int) -> None:
    """Also with keys in another order, and 0 for a region without keys."""
    rng = np.random.default_rng(seed)
    R, region = 4, rng.integers(0, 4, (1, 12)).astype(np.int32)
    k = rng.normal(size=(1, 12, 2, 4)).astype(np.float32)
    logits = rng.normal(size=(1, 12, 2)).astype(np.float32) if name == "learned" else None
    found = np.asarray(described(name, jnp.asarray(k), logits, jnp.asarray(region), R))
    for n, head in np.ndindex(R, 2):
        (mine,) = np.nonzero(region[0] == n + 1)
        keys = np.float64(k[0, mine, head])
        if not len(mine):
            assert not found[0, n, head].any()
            continue
        expected = {
            "mean": lambda keys=keys: keys.mean(0),
            "min_max": lambda keys=keys: np.concatenate([keys.max(0), keys.min(0)]),
            "spread": lambda keys=keys: np.concatenate([keys.mean(0), keys.var(0)]),
            "learned": lambda keys=keys, mine=mine, head=head: np.average(
                keys, 0, weights=np.exp(8 * np.tanh(np.float64(logits[0, mine, head]) / 8))
            ),
        }[name]()
        np.testing.assert_allclose(found[0, n, head], expected, atol=2e-5)
    order = rng.permutation(12)
    moved = [None if x is None else x[:, order] for x in (k, logits, region)]
    np.testing.assert_allclose(in_parts(name, *moved, cut, R), found, atol=2e-5)


@functools.partial(jax.jit, static_argnames=("name", "R"))
def in_parts(name, k, logits, region, cut, R):
    """The first `cut` keys, and apart from them the others: keys of no region say nothing."""
    first = jnp.arange(region.shape[1]) < cut
    a, b = (descriptors.summarise(name, k, logits, jnp.where(mine, region, 0), R) for mine in (first, ~first))
    return descriptors.describe(name, descriptors.combine(a, b), (1, R, 2, 4), jnp.zeros((1, R), jnp.int32))


def test_small_regions_keep_their_share_where_they_are_normalised() -> None:
    """With random keys: of the first places of a third of all regions, which have 6 keys where the others have 36."""
    rng, R = np.random.default_rng(0), 6
    sizes = np.array([36, 36, 6, 36, 36, 6])
    region = jnp.asarray(np.tile(np.repeat(np.arange(1, R + 1), sizes), (300, 1)), jnp.int32)
    k = np.float32(rng.normal(size=(*region.shape, 1, 32)) + 3 * rng.normal(size=(300, 1, 1, 32)))

    @jax.jit
    def both(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        summary = descriptors.summarise("mean", k, None, region, R)
        mean = descriptors.describe("mean", summary, (300, R, 1, 32), jnp.zeros((300, R), jnp.int32))
        return mean, descriptors.evened(mean, summary, jnp.broadcast_to(jnp.arange(R) == 0, (300, R)), 36)

    mean, found = map(np.asarray, both(k))
    q = rng.normal(size=(300, 64, 32))
    share = [np.isin(np.einsum("bth,brh->btr", q, d[:, :, 0]).argmax(-1), (2, 5)).mean() for d in (mean, found)]
    assert share[0] > 0.45 and abs(share[1] - 1 / 3) < 0.03
    np.testing.assert_array_equal(found[:, sizes == 36], mean[:, sizes == 36])


def test_a_normalised_mean_lies_nearer_to_that_of_its_frames() -> None:
    """Of every region of the rows, whose frames are those of one document and picture: at the edge, by sqrt(n / m)."""
    given, router = rows(), gaze(normalise="keys").build(AttentionDims(4, 2, 8), jax.random.key(0))
    info, x = jax.tree.map(np.asarray, given.info), features(rows=2, length=T)

    @jax.jit
    def descriptors_of(x: Features, info: TokenInfo) -> jax.Array:
        summary = router.summarise(x, info.region, 16)
        return router.route(x, summary, info, info, causal_codes(info), 16, None).routes.descriptor

    found = descriptors_of(x, given.info)
    ragged = 0
    for b, n in np.ndindex(2, 16):
        mine = info.region[b] == n + 1
        if not mine.any():
            continue
        of = mine.argmax()
        same = ["document", "image", "frame"]
        frames = np.all([getattr(info, name)[b] == getattr(info, name)[b, of] for name in same], axis=0)
        frames &= info.region[b] > 0
        mean, around = (np.float64(x.k)[b, some].mean(0) for some in (mine, frames))
        ragged += mine.sum() < 6
        np.testing.assert_allclose(found[b, n], around + (mine.sum() / 6) ** 0.5 * (mean - around), atol=1e-5)
    assert ragged > 4


def test_min_max_bounds_the_score_of_every_key() -> None:
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(1, 5, 2, 4))), jnp.asarray(rng.normal(size=(1, 6, 2, 4)))
    d = described("min_max", k, None, jnp.ones((1, 6), jnp.int32), 1)
    bound = jnp.einsum("BTKc,BRKc->BTK", descriptors.features("min_max", q, jnp.zeros((1, 5), jnp.int32)), d)
    assert (np.einsum("btkh,bskh->bstk", q, k) <= np.asarray(bound)[:, None] + 1e-5).all()


def test_spread_is_the_log_of_a_region_s_mass_to_second_order() -> None:
    """Of weights exp(<q, k> / sqrt(h)): by a product over channels, for keys whose channels vary apart."""
    h, rng = 4, np.random.default_rng(0)
    one = rng.normal(size=(2, h))
    k = np.stack([[one[bit, c] for c, bit in enumerate(np.unravel_index(n, (2,) * h))] for n in range(2**h)])
    q = 0.1 * rng.normal(size=(5, h))
    d = described("spread", jnp.asarray(k[None, :, None]), None, jnp.ones((1, 2**h), jnp.int32), 1)
    x = descriptors.features("spread", jnp.asarray(q[None, :, None]), jnp.zeros((1, 5), jnp.int32))
    found = np.einsum("btkc,brkc->t", x, d)
    np.testing.assert_allclose(found, np.log(np.exp(q @ k.T / h**0.5).mean(1)), atol=1e-5)
