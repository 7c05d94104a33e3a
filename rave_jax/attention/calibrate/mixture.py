"""Do numbers lie in two heaps, and where is the valley between them: a mixture of two normal distributions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rave_jax.typing import Float, NpArray

STEPS = 500
"""Most steps of the fit."""
SEPARATED = 2.0
"""Ashman's D from which two heaps count as two."""


class Mixture(NamedTuple):
    """p(x) = sum_k weight_k N(x | mean_k, variance_k) of two parts, the lower mean first."""

    weight: Float[NpArray, "2"]
    mean: Float[NpArray, "2"]
    variance: Float[NpArray, "2"]

    @property
    def separation(self) -> float:
        """Ashman's D: sqrt(2) |mean_1 - mean_2| / sqrt(variance_1 + variance_2)."""
        return float(np.sqrt(2) * abs(self.mean[1] - self.mean[0]) / np.sqrt(self.variance.sum()))

    def density(self, x: Float[NpArray, "N"]) -> Float[NpArray, "N"]:
        """p of each number."""
        return self._parts(x).sum(0)

    def _parts(self, x: Float[NpArray, "N"]) -> Float[NpArray, "2 N"]:
        off = (x - self.mean[:, None]) ** 2 / self.variance[:, None]
        return self.weight[:, None] * np.exp(-off / 2) / np.sqrt(2 * np.pi * self.variance[:, None])


def fitted(values: Float[NpArray, "N"]) -> Mixture:
    """The mixture by expectation maximisation, from the halves below and above the middle of the range.

    Args:
        values: two numbers or more, not all equal.
    """
    x = np.sort(np.asarray(values, np.float64))
    # A part of few equal numbers would otherwise become a point.
    least = 1e-4 * (x[-1] - x[0]) ** 2
    halves = x <= (x[0] + x[-1]) / 2
    share = np.stack([halves, ~halves]).astype(np.float64)
    found, before = _of_shares(share, x, least), -np.inf
    for _ in range(STEPS):
        parts = found._parts(x) + 1e-300
        likelihood = float(np.log(parts.sum(0)).sum())
        if likelihood - before < 1e-9 * len(x):
            break
        before = likelihood
        found = _of_shares(parts / parts.sum(0), x, least)
    order = np.argsort(found.mean, kind="stable")
    return Mixture(*(field[order] for field in found))


def valley(values: Float[NpArray, "N"]) -> float | None:
    """Where the density of the mixture is lowest between its means; None where the numbers are one heap: Ashman's D
    below 2, no valley, a heap of fewer than two numbers, or explained as well by one normal distribution (by the
    Bayesian information criterion, since a mixture fitted to one heap often has a large D); or fewer than eight."""
    x = np.asarray(values, np.float64).ravel()
    if len(x) < 8 or x.min() == x.max():
        return None
    found = fitted(x)
    one = -len(x) / 2 * (np.log(2 * np.pi * x.var()) + 1)
    # Five numbers describe the mixture, and two the single distribution.
    better = 2 * (np.log(found.density(x) + 1e-300).sum() - one) > 3 * np.log(len(x))
    if found.separation < SEPARATED or not better or found.weight.min() * len(x) < 2:
        return None
    grid = np.linspace(*found.mean, 2001)
    lowest = int(np.argmin(found.density(grid)))
    return float(grid[lowest]) if 0 < lowest < len(grid) - 1 else None


def _of_shares(share: Float[NpArray, "2 N"], x: Float[NpArray, "N"], least: float) -> Mixture:
    """The mixture in which each number belongs to each part by its share."""
    total = share.sum(1) + 1e-12
    mean = (share @ x) / total
    variance = (share * (x - mean[:, None]) ** 2).sum(1) / total + least
    return Mixture(total / total.sum(), mean, variance)
