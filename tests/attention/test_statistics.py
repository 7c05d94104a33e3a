"""Sums over rows and columns of the map equal those of the whole map, and who does not ask pays nothing.

Spans, entropy and column sums are written out densely as the module states them; entropy is checked against
L_i - sum_j P_ij s_ij as well, of plain attention.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention import statistics
from tests.attention.packed import DIMS, KEY, ROWS, attend, dense_map, features, info_of

CAPS, BANDS = (None, 3), ((0, 100), (2, 4))
MECHANISMS = (
    at.Rave(rank=2),
    at.Var(dims=(1,), tau=1.2, summ=0.05, layers="all"),
    at.ZeroTuning(heads=(1,), gamma=3.0),
)


def wanted(weights: Any) -> at.WantedStatistics:
    return at.WantedStatistics(jnp.asarray(weights, jnp.float32), CAPS, BANDS, entropy=True, rises=True)


@pytest.fixture(scope="module")
def found() -> tuple[np.ndarray, np.ndarray, at.Statistics]:
    """Weights, the whole map and what was counted, in blocks that do not divide the row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK", 5)
        x, info = features(), info_of(*ROWS)
        weights = np.random.default_rng(3).integers(0, 3, info.document.shape)
        weights[:, 5:10] = 0
        every = jnp.broadcast_to(jnp.arange(x.q.shape[1]), x.q.shape[:2])
        mechanisms = at.build_mechanisms(MECHANISMS, DIMS, KEY)
        run = jax.jit(lambda x, w: attend(x, info, mechanisms, queries=every, statistics=wanted(w)))
        out = run(x, weights)
    assert out.attention is not None and out.statistics is not None
    return weights, np.float64(out.attention), out.statistics


def test_sums_are_those_of_the_whole_map(found: Any) -> None:
    weights, whole, counted = found
    offset = np.asarray(info_of(*ROWS).offset)
    away = offset[:, :, None] - offset[:, None]
    read = np.float64(weights != 0)[..., None]
    for n, cap in enumerate(CAPS):
        far = np.clip(away, 0, cap)
        np.testing.assert_allclose(counted.spans[:, n], read * np.einsum("BTHS,BTS->BTH", whole, far), atol=1e-5)
    for n, (low, high) in enumerate(BANDS):
        band = weights[:, :, None] * ((away >= low) & (away <= high))
        np.testing.assert_allclose(counted.columns[:, n], np.einsum("BTS,BTHS->BSH", band, whole), atol=1e-5)
    logs = np.log(np.where(whole > 0, whole, 1))
    np.testing.assert_allclose(counted.entropy, -read * np.sum(whole * logs, axis=-1), atol=1e-5)
    before = np.concatenate([np.zeros_like(whole[:, :1]), whole[:, :-1]], axis=1)
    rises = np.einsum("BT,BTHS->BSH", weights, np.maximum(whole - before, 0))
    np.testing.assert_allclose(counted.rises, rises, atol=1e-5)
    assert min(np.abs(np.asarray(x)).max() for x in counted) > 0.1


def test_entropy_is_the_log_sum_exp_less_the_mean_score() -> None:
    x, info = features(), info_of(*ROWS)
    asked = at.WantedStatistics(jnp.ones(info.document.shape), entropy=True)
    counted = jax.jit(lambda x: attend(x, info, [], statistics=asked).statistics)(x)
    assert counted.spans is None and counted.columns is None and counted.rises is None
    rows = dense_map((), x, info)
    scores = np.einsum("BTHh,BSHh->BTHS", np.float64(x.q), np.repeat(np.float64(x.k), 2, axis=2)) * 8**-0.5
    total = np.log(np.sum(np.where(rows > 0, np.exp(scores), 0), axis=-1, initial=1e-300))
    some = np.asarray(info.document)[..., None] > 0
    np.testing.assert_allclose(counted.entropy, some * (total - np.sum(rows * scores, axis=-1)), atol=1e-4)


def test_who_does_not_ask_pays_nothing() -> None:
    x, info = features(), info_of(*ROWS)

    def program(**asked: Any) -> str:
        return str(jax.make_jaxpr(lambda x: attend(x, info, [], **asked).out)(x))

    assert program(statistics=None) == program()
