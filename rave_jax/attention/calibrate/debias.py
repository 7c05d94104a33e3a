"""Fits the bias for places that pruning by attention takes out.

Source: arXiv 2508.17807, github intcomp/attention-bias e75ebe7. Over many samples the mean attention of a prompt's last
token to the visual tokens grows with their place x = i / L in the picture, whatever is there. A curve

    f(x) = mu exp(sigma x)

is fitted to it by least squares. Ours: pictures differ in size, so that the mean is over places in equal bins, each of
which counts by the tokens in it; the repository's own file for FastV is a spline.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rave_jax.attention.pruning import Pruning
from rave_jax.config import ConfigError, check_fields, require
from rave_jax.typing import Float, NpArray

BINS = 100
"""Places are told apart to a hundredth of the picture."""
STEEPEST = 30.0
"""Largest sigma that is looked for."""


@dataclass(frozen=True)
class DebiasSearch:
    """Where tokens are to leave, and how many stay."""

    layer: int = 1
    """Decoder layer, counted from 0, whose attention ranks and behind which tokens leave."""
    keep: float = 0.5
    """Share of the visual tokens that stay."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.layer >= 0, "layer", self.layer, "a number of a layer, from 0")
        require(0 <= self.keep < 1, "keep", self.keep, "a share from 0 to below 1")

    @property
    def undebiased(self) -> Pruning:
        """The mechanism without a curve."""
        return Pruning(self.keep, padding="leaves", layers=(self.layer,))

    def config_of(self, curve: Curve) -> Pruning:
        """The mechanism to put into a model's config."""
        return dataclasses.replace(self.undebiased, slope=round(curve.sigma, 6))


class Curve(NamedTuple):
    """f(x) = mu exp(sigma x), and the share of the variance of the bins' means that it explains."""

    mu: float
    sigma: float
    explained: float


def fitted(places: Float[NpArray, "N"], attention: Float[NpArray, "N"]) -> Curve:
    """The curve of the mean attention at each place.

    Args:
        places: of visual tokens of all samples, 0 to below 1.
        attention: that each got.

    Raises:
        ConfigError: a number is not finite, or all tokens have one place or no attention.
    """
    if not (np.isfinite(attention).all() and np.isfinite(places).all()):
        raise ConfigError("the attention to visual tokens is not finite: check the model's weights and number types")
    bins = np.minimum((places * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    used = count > 0
    if used.sum() < 2 or not attention.any():
        raise ConfigError("a curve needs visual tokens at two places that get attention: give larger pictures")

    def mean(values: NpArray) -> NpArray:
        return np.bincount(bins, values, BINS)[used] / count[used]

    x, a, weight = mean(places), mean(attention), count[used] / count.sum()

    def at(sigma: float) -> tuple[float, float]:
        """The best mu, and what is left."""
        curve = np.exp(sigma * (x - x.max()))
        mu = np.sum(weight * a * curve) / np.sum(weight * curve**2)
        return mu * np.exp(-sigma * x.max()), float(np.sum(weight * (a - mu * curve) ** 2))

    middle, width = 0.0, STEEPEST
    for _ in range(8):
        grid = np.clip(np.linspace(middle - width, middle + width, 61), -STEEPEST, STEEPEST)
        middle, width = float(min(grid, key=lambda sigma: at(sigma)[1])), width / 10
    mu, rest = at(middle)
    spread = float(np.sum(weight * (a - np.sum(weight * a)) ** 2))
    return Curve(float(mu), middle, 1 - rest / spread if spread else 0.0)
