"""Finds the heads and the gamma of ZeroTuning by running a model on a calibration set.

Source: arXiv 2505.11739 and its released code.
- Profile: the set is run with gamma 1.5 on one head alone, for every head. A head is up-effective if the result gets
  better when its first token gets more attention, and down-effective otherwise.
  The released code also has a cheaper profile: one head number in all layers at once.
- One type is tuned, the dominant one: both at once were not better. 40 to 70 % of the heads were best.
- One gamma for these heads comes from a grid: with labels by accuracy, without by the least mean entropy of the
  answers, which also chooses the type.

Our reading, where the source leaves it open: the size of the set, the grid and the fraction are configuration. The
dominant type has the larger sum of effects, then the more heads. The fraction is of all heads, the most effective of
the type first; a head whose effect is exactly 0 is down-effective, and last. Without labels the profile is of the
entropy too. Gamma 1 is always tried and needs no run of its own; among equal results the gamma nearest to 1 is kept, so
that a search in which nothing helps changes nothing.

The model runs once without a change, once for every head (or number of a head), and once for every gamma of the grid
but 1, twice that without labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from rave_jax.attention.zero_tuning import LEAST, MOST, ZeroTuning
from rave_jax.config import ConfigError, check_fields, require
from rave_jax.typing import Array, Bool, Float, NpArray

Measure = Callable[[Float[NpArray, "L H"]], Any]
"""A table of gammas in; a number for each sample of the calibration set out, the same samples whatever the table."""

Type = Literal["up", "down"]


@dataclass(frozen=True)
class ZeroTuningSearch:
    """How the heads and the gamma are looked for."""

    criterion: Literal["accuracy", "entropy"] = "accuracy"
    """What is made better: accuracy, which needs labels, goes up; entropy of the answers, which needs none, down."""
    probe: float = 1.5
    """Factor of a single head's first-token weight while heads are profiled, above 1."""
    profile: Literal["head", "number"] = "head"
    """What is profiled at a time: one head of one layer, in L H runs, or the heads of one number in all layers
    together, in H runs; they are then of one type and chosen together."""
    fraction: float = 0.5
    """Most heads that are tuned, as a part of all heads of the model; 0.4 to 0.7 were best in the paper."""
    grid: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
    """Gammas that are tried on the chosen heads together, 1 among them."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 < self.probe <= MOST, "probe", self.probe, f"a number above 1, at most {MOST:g}")
        require(0 < self.fraction <= 1, "fraction", self.fraction, "a number above 0, at most 1")
        usable = all(LEAST <= gamma <= MOST for gamma in self.grid) and 1.0 in self.grid
        require(usable, "grid", self.grid, f"numbers from {LEAST:g} to {MOST:g}, 1 (no change) among them")


class Profile(NamedTuple):
    """What single heads do.

    Fields:
        neutral: mean of what is measured with every gamma 1.
        effect: how much better the mean gets where a head's first token gets more attention, whether better is more or
            less of it. N is L, or 1 where all layers were profiled together.
    """

    neutral: float
    effect: Float[NpArray, "N H"]

    def of_type(self, kind: Type) -> Bool[NpArray, "N H"]:
        """Heads of a type; each head has one."""
        up = self.effect > 0
        return up if kind == "up" else ~up

    @property
    def dominant(self) -> Type:
        """The more effective type, or the larger one where they are equal."""
        weight = {kind: self._weight(self.of_type(kind)) for kind in ("up", "down")}
        return "up" if weight["up"] > weight["down"] else "down"

    def _weight(self, heads: Bool[NpArray, "L H"]) -> tuple[float, int]:
        return float(np.abs(self.effect[heads]).sum()), int(heads.sum())

    def chosen(self, kind: Type, fraction: float) -> Bool[NpArray, "N H"]:
        """The most effective heads of a type, at most a fraction of all heads and at least one of them."""
        strength = np.where(self.of_type(kind), np.abs(self.effect), -1.0).ravel()
        count = max(1, round(fraction * strength.size))
        best = np.argsort(-strength, kind="stable")[:count]
        heads = np.zeros(strength.size, bool)
        heads[best[strength[best] >= 0]] = True
        return heads.reshape(self.effect.shape)


class Trial(NamedTuple):
    """One gamma on the chosen heads of one type, and the mean of what is measured."""

    kind: Type
    gamma: float
    mean: float


class Tuned(NamedTuple):
    """What a search found.

    Fields:
        profile: of the single heads.
        trials: everything that was tried on heads together.
        best: the trial that is kept.
        gammas: a factor for each layer and head.
    """

    profile: Profile
    trials: tuple[Trial, ...]
    best: Trial
    gammas: Float[NpArray, "L H"]

    @property
    def configs(self) -> tuple[ZeroTuning, ...]:
        """The mechanisms to put into a model's config; none where gamma 1 was best."""
        return configs_of(self.gammas)


def tune(search: ZeroTuningSearch, measure: Measure, layers: int, heads: int) -> Tuned:
    """Profile every head of a model, or every number of a head, then find one gamma for the chosen ones.

    Args:
        search: how.
        measure: runs the model under a table of gammas, with `with_gammas` for one. Gives a score for each sample, more
            is better, or for the criterion "entropy" the entropy of each sample's answer.
        layers, heads: L and H of the decoder.

    Raises:
        ConfigError: no layers or heads; or the callable gives no samples, another number of them than before, or a
            number that is not finite.
    """
    require(layers >= 1, "layers", layers, "at least 1")
    require(heads >= 1, "heads", heads, "at least 1")
    profile = profiled(search, measure, layers, heads)
    sign = _sign(search)

    def table(chosen: Bool[NpArray, "N H"], gamma: float) -> Float[NpArray, "L H"]:
        return np.array(np.broadcast_to(np.where(chosen, gamma, 1.0), (layers, heads)))

    trials: list[Trial] = []
    for kind in (profile.dominant,) if search.criterion == "accuracy" else ("up", "down"):
        chosen = profile.chosen(kind, search.fraction)
        for gamma in dict.fromkeys(search.grid) if chosen.any() else ():
            unchanged = gamma == 1
            mean = profile.neutral if unchanged else _mean(measure, table(chosen, gamma))
            trials.append(Trial(kind, gamma, mean))
    best = max(trials, key=lambda trial: (sign * trial.mean, -abs(math.log(trial.gamma))))
    return Tuned(profile, tuple(trials), best, table(profile.chosen(best.kind, search.fraction), best.gamma))


def profiled(search: ZeroTuningSearch, measure: Measure, layers: int, heads: int) -> Profile:
    """What each head does alone. Arguments and errors are those of `tune`."""
    values = _values(measure, np.ones((layers, heads)))
    samples, neutral = len(values), float(values.mean())
    effect = np.zeros((layers if search.profile == "head" else 1, heads))
    for place in np.ndindex(*effect.shape):
        gammas = np.ones((layers, heads))
        gammas[place if search.profile == "head" else (slice(None), place[1])] = search.probe
        values = _values(measure, gammas)
        if len(values) != samples:
            where = f"layer {place[0]}" if search.profile == "head" else "all layers"
            raise ConfigError(
                f"the calibration set has {len(values)} samples with gamma {search.probe} of head {place[1]} in "
                f"{where}, and had {samples} before: every run has to measure the same samples"
            )
        effect[place] = _sign(search) * (float(values.mean()) - neutral)
    return Profile(neutral, effect)


def configs_of(gammas: Float[NpArray, "L H"]) -> tuple[ZeroTuning, ...]:
    """A table of gammas as mechanisms: one for all layers with equal gammas, none for those with nothing but 1."""
    table = np.asarray(gammas, np.float64)
    layers_of: dict[tuple[float, ...], list[int]] = {}
    for layer, row in enumerate(table.tolist()):
        layers_of.setdefault(tuple(row), []).append(layer)
    found = []
    for row, layers in layers_of.items():
        heads = tuple(n for n, gamma in enumerate(row) if gamma != 1)
        if not heads:
            continue
        given = tuple(row[n] for n in heads)
        found.append(
            ZeroTuning(
                gamma=given[0] if len(set(given)) == 1 else given,
                heads="all" if len(heads) == len(row) else heads,
                layers="all" if len(layers) == len(table) else tuple(layers),
            )
        )
    return tuple(found)


def entropy(log_probs: Float[Array, "*rows A"]) -> Float[Array, "*rows"]:
    """Entropy of distributions over A answers in nats, from their log-probabilities; -inf is an answer never given."""
    seen = log_probs > -jnp.inf
    return -jnp.sum(jnp.where(seen, jnp.exp(log_probs) * jnp.where(seen, log_probs, 0.0), 0.0), axis=-1)


def _sign(search: ZeroTuningSearch) -> float:
    return 1.0 if search.criterion == "accuracy" else -1.0


def _mean(measure: Measure, gammas: Float[NpArray, "L H"]) -> float:
    return float(_values(measure, gammas).mean())


def _values(measure: Measure, gammas: Float[NpArray, "L H"]) -> NpArray:
    """What is measured of each sample, float64."""
    values = np.asarray(measure(gammas), np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ConfigError(
            f"the calibration set gives an array of shape {values.shape}, expected a number for each of its samples, "
            "at least one"
        )
    if not np.isfinite(values).all():
        raise ConfigError(
            f"the calibration set gives {np.sum(~np.isfinite(values))} of {values.size} numbers that are not finite, "
            "as the model's outputs are: check its weights and number types"
        )
    return values
