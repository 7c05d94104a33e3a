"""The curve of attention by place: found again from its own numbers, and refused where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from rave_jax.attention import Pruning
from rave_jax.attention.calibrate.debias import DebiasSearch, fitted
from rave_jax.config import ConfigError


@pytest.mark.parametrize("sigma", [1.25, -0.7, 0.0, 6.0])
def test_a_curve_is_found_from_its_own_numbers(sigma: float) -> None:
    """Of pictures of many sizes, with noise that is the same at every place."""
    rng = np.random.default_rng(0)
    places = np.concatenate([np.arange(n) / n for n in (36, 100, 576, 1024)] * 8)
    attention = 0.002 * np.exp(sigma * places) * (1 + 0.05 * rng.normal(size=len(places)))
    found = fitted(places, attention)
    assert found.sigma == pytest.approx(sigma, abs=0.03) and found.mu == pytest.approx(0.002, rel=0.05)
    assert found.explained > 0.9 or sigma == 0
    config = DebiasSearch(layer=2, keep=0.25).config_of(found)
    assert config == Pruning(0.25, round(found.sigma, 6), "leaves", (2,))


def test_the_curve_has_the_least_squares() -> None:
    """Nothing near it is closer to the means of a hundred bins."""
    rng = np.random.default_rng(1)
    places = rng.uniform(size=4000)
    attention = 0.1 + places**3 + 0.1 * rng.uniform(size=4000)
    found = fitted(places, attention)
    bins = (places * 100).astype(int)
    means = [(places[bins == b].mean(), attention[bins == b].mean(), (bins == b).sum()) for b in np.unique(bins)]
    x, a, count = np.array(means).T

    def rest(mu: float, sigma: float) -> float:
        return float(np.sum(count * (a - mu * np.exp(sigma * x)) ** 2))

    best = rest(found.mu, found.sigma)
    near = [rest(found.mu * (1 + i), found.sigma + j) for i in (-1e-3, 0, 1e-3) for j in (-1e-3, 0, 1e-3)]
    assert min(near) == pytest.approx(best, rel=1e-9)


def test_what_has_no_curve_is_refused() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        fitted(np.array([0.0, 0.5]), np.array([1.0, np.nan]))
    with pytest.raises(ConfigError, match="two places"):
        fitted(np.array([0.5, 0.5]), np.array([1.0, 2.0]))
    with pytest.raises(ConfigError, match="keep is"):
        DebiasSearch(keep=1.0)
