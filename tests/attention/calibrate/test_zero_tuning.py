"""The search of ZeroTuning finds what a constructed landscape hides, and its traced table is what its configs build."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import config as machinery
from rave_jax.attention import MechanismConfig, Rave, ZeroTuning
from rave_jax.attention.calibrate.traced import with_gammas
from rave_jax.attention.calibrate.zero_tuning import (
    Measure,
    Profile,
    ZeroTuningSearch,
    configs_of,
    entropy,
    profiled,
    tune,
)
from rave_jax.config import ConfigError
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from tests.models.layout import batch, document
from tests.models.made import model as made

L, H = 3, 4
N = 32
"""Samples of the constructed sets."""
TEXT = TextConfig(vocab_size=64, hidden_size=32, num_layers=L, num_heads=H, mlp_size=32)
CONFIG = VlmConfig(text=TEXT, family="qwen3")
GAMMAS = np.array([[1.0, 3.0, 1.0, 0.25], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])


def accuracy(good: dict[tuple[int, int], float], bad: dict[tuple[int, int], float], best: float) -> Measure:
    """Scores in which the gammas of some heads help as far as `best`, and those of others in the other way only."""

    def measure(gammas: np.ndarray) -> np.ndarray:
        reached = sum(share * _peak(gammas[head], best) for head, share in good.items())
        reached += sum(share * _peak(gammas[head], 1 / best) for head, share in bad.items())
        return (np.arange(N) < round(N * (0.25 + reached))).astype(float)

    return measure


def _peak(gamma: float, best: float) -> float:
    """1 at `best`, 0 at 1, lower on its other side."""
    return 1 - abs(math.log(gamma / best)) / abs(math.log(best))


HELPING = {(0, 1): 0.25, (2, 3): 0.125, (1, 0): 0.25}
OTHER = {(0, 0): 0.0625, (2, 2): 0.0625}


@pytest.mark.parametrize(("kind", "best"), [("up", 2.0), ("down", 0.6)])
def test_the_profile_finds_the_heads_and_their_type(kind: Literal["up", "down"], best: float) -> None:
    found = profiled(ZeroTuningSearch(), accuracy(HELPING, OTHER, best), L, H)
    assert found.neutral == 0.25 and found.dominant == kind
    signs = {head: math.copysign(1, found.effect[head]) for head in (*HELPING, *OTHER)}
    way = 1 if kind == "up" else -1
    assert signs == dict.fromkeys(HELPING, way) | dict.fromkeys(OTHER, -way)
    assert np.count_nonzero(found.effect) == len(signs)
    strongest = {(int(a), int(b)) for a, b in np.argwhere(found.chosen(kind, 2 / (L * H)))}
    assert strongest == {(0, 1), (1, 0)}


@pytest.mark.parametrize(("kind", "best"), [("up", 2.0), ("down", 0.6)])
def test_the_supervised_search_finds_the_gamma_of_the_dominant_heads(kind: str, best: float) -> None:
    search = ZeroTuningSearch(fraction=len(HELPING) / (L * H))
    found = tune(search, accuracy(HELPING, OTHER, best), L, H)
    assert (found.best.kind, found.best.gamma, found.best.mean) == (kind, best, 0.875)
    assert {trial.kind for trial in found.trials} == {kind} and len(found.trials) == len(search.grid)
    wanted = np.ones((L, H))
    wanted[tuple(zip(*HELPING, strict=True))] = best
    np.testing.assert_array_equal(found.gammas, wanted)
    assert set(found.configs) == {
        ZeroTuning(best, heads=(1,), layers=(0,)),
        ZeroTuning(best, heads=(0,), layers=(1,)),
        ZeroTuning(best, heads=(3,), layers=(2,)),
    }


def test_heads_of_one_number_are_profiled_in_all_layers_together() -> None:
    """H runs for the profile; and what is chosen is chosen in every layer."""
    runs = []

    def measure(gammas: np.ndarray) -> np.ndarray:
        runs.append(gammas)
        return accuracy({(n, 1): 0.125 for n in range(L)}, {(n, 2): 0.0625 for n in range(L)}, 2.0)(gammas)

    search = ZeroTuningSearch(profile="number", fraction=1 / H)
    found = tune(search, measure, L, H)
    assert len(runs) == 1 + H + len(search.grid) - 1 and found.profile.effect.shape == (1, H)
    for head, gammas in enumerate(runs[1 : 1 + H]):
        assert [tuple(place) for place in np.argwhere(gammas == search.probe)] == [(n, head) for n in range(L)]
    assert found.configs == (ZeroTuning(2.0, heads=(1,)),)


def test_the_fraction_is_of_all_heads_and_takes_one_type_alone() -> None:
    effect = np.array([[3.0, -1.0], [2.0, 0.0]])
    profile = Profile(0.5, effect)
    assert profile.of_type("down").tolist() == [[False, True], [False, True]]
    assert profile.chosen("up", 1.0).tolist() == [[True, False], [True, False]]
    assert profile.chosen("up", 0.25).tolist() == [[True, False], [False, False]]
    assert profile.chosen("down", 0.25).tolist() == [[False, True], [False, False]]
    assert not Profile(0.5, np.ones((2, 2))).chosen("down", 1.0).any()
    assert profile.dominant == "up" and Profile(0.5, -effect).dominant == "down"
    # Equally effective: the larger type.
    assert Profile(0.5, np.array([[1.0, 1.0, -2.0]])).dominant == "up"


def test_the_unsupervised_search_minimises_the_mean_entropy_over_both_types() -> None:
    """Answers of four kinds, surer the nearer the down heads are to 0.4; the up heads help too, and less."""
    down, up = ((0, 2), (1, 1)), ((2, 0),)
    runs = []

    def log_probs(gammas: np.ndarray) -> np.ndarray:
        sharp = sum(_peak(gammas[head], 0.4) for head in down) + 0.5 * sum(_peak(gammas[head], 2.0) for head in up)
        logits = np.exp(sharp) * np.random.default_rng(0).normal(size=(N, 4))
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def measure(gammas: np.ndarray) -> np.ndarray:
        runs.append(gammas)
        return np.asarray(entropy(jnp.asarray(log_probs(gammas))))

    def stated(kind: str, gamma: float) -> float:
        gammas = np.ones((L, H))
        for head in down if kind == "down" else up:
            gammas[head] = gamma
        found = log_probs(gammas)
        return float(-(np.exp(found) * found).sum(-1).mean())

    search = ZeroTuningSearch("entropy", fraction=2 / (L * H))
    found = tune(search, measure, L, H)
    assert (found.best.kind, found.best.gamma) == ("down", 0.4)
    every = {(kind, gamma): stated(kind, gamma) for kind in ("up", "down") for gamma in search.grid}
    assert min(every, key=lambda key: every[key]) == ("down", 0.4)
    np.testing.assert_allclose([t.mean for t in found.trials], list(every.values()), rtol=1e-5)
    assert [tuple(np.argwhere(g != 1)[0]) for g in runs[1 : 1 + L * H]] == list(np.ndindex(L, H))
    assert len(runs) == 1 + L * H + 2 * (len(search.grid) - 1)


def test_entropy_is_that_of_the_distribution() -> None:
    probabilities = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    wanted = [math.log(2), 0.0, -sum(p * math.log(p) for p in (0.2, 0.3, 0.5))]
    np.testing.assert_allclose(entropy(jnp.log(probabilities)), wanted, atol=1e-6)


@pytest.mark.parametrize("criterion", ["accuracy", "entropy"])
@pytest.mark.parametrize("harm", [0.0, 0.1])
def test_gamma_one_is_kept_where_nothing_helps(criterion: Any, harm: float) -> None:
    sign = -1 if criterion == "accuracy" else 1

    def measure(gammas: np.ndarray) -> np.ndarray:
        return np.full(N, 0.5 + sign * harm * np.abs(np.log(gammas)).sum())

    found = tune(ZeroTuningSearch(criterion), measure, L, H)
    assert found.best.gamma == 1 and found.configs == () and (found.gammas == 1).all()


def test_a_table_as_configs_has_one_for_equal_layers_and_survives_its_json() -> None:
    found = configs_of(GAMMAS)
    assert found == (ZeroTuning((3.0, 0.25), heads=(1, 3), layers=(0,)), ZeroTuning(2.0, layers=(2,)))
    assert configs_of(np.full((2, 2), 0.5)) == (ZeroTuning(0.5),)
    assert machinery.loads(tuple[MechanismConfig, ...], machinery.dumps(found)) == found


def test_the_traced_table_is_the_model_of_its_configs_and_compiles_once() -> None:
    rng = np.random.default_rng(0)
    rows = batch(
        [[document([5], CONFIG, rng), document([7], CONFIG, rng)], [document([11], CONFIG, rng)]], CONFIG, 16, 0
    )
    own = Rave(rank=2, layers=(0, 1))  # a scan of two layers, and one of one
    model = made(CONFIG, ModelOptions(mechanisms=(own,)))

    @jax.jit
    def logits(model: Vlm, gammas: np.ndarray) -> jax.Array:
        decoder = with_gammas(model.decoder, gammas)
        return model.logits(decoder(model.embedded(rows), rows.info, rows.positions).hidden)

    @jax.jit
    def plain(model: Vlm) -> jax.Array:
        return model.logits(model.forward(rows).hidden)

    before = jax.tree.structure(model)
    tables = [np.ones((L, H)), GAMMAS]
    for place in np.ndindex(L, H):
        tables.append(np.ones((L, H)))
        tables[-1][place] = 1.5
    found = [np.asarray(logits(model, table)) for table in tables]
    assert logits._cache_size() == 1 and jax.tree.structure(model) == before
    np.testing.assert_allclose(found[0], plain(model), atol=1e-5)
    assert all(np.abs(found[0] - other).max() > 1e-4 for other in found[1:]), "a head was not reached"
    # Layer by layer, so that both hold the same arrays: the mechanisms that are added have none.
    options = ModelOptions(mechanisms=(own, *configs_of(GAMMAS)), scan_layers=False)
    alone = made(CONFIG, ModelOptions(mechanisms=(own,), scan_layers=False))
    built = jax.tree.unflatten(jax.tree.structure(made(CONFIG, options)), jax.tree.leaves(alone))
    np.testing.assert_allclose(plain(built), logits(alone, GAMMAS), atol=1e-5)
    assert np.abs(plain(built) - plain(alone)).max() > 1e-2
    with pytest.raises(ConfigError, match=r"shape \(3, 2\), expected \(layers, heads\) of \(3, 4\)"):
        with_gammas(model.decoder, jnp.ones((3, 2)))


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"grid": (0.5, 2.0)}, "grid"),
        ({"grid": ()}, "grid"),
        ({"grid": (1.0, 0.0)}, "grid"),
        ({"probe": 1.0}, "probe"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
    ],
)
def test_bad_searches_name_the_field(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ZeroTuningSearch(**bad)


@pytest.mark.parametrize(
    ("values", "layers", "heads", "said"),
    [
        (lambda n: np.zeros(0), L, H, "calibration set gives an array of shape"),
        (lambda n: np.zeros((3, 2)), L, H, r"shape \(3, 2\)"),
        (lambda n: np.full(3, np.nan), L, H, "not finite"),
        (lambda n: np.zeros(n), L, H, "has 2 samples with gamma 1.5 of head 0 in layer 0, and had 1 before"),
        (lambda n: np.zeros(3), L, 0, "heads is 0"),
        (lambda n: np.zeros(3), 0, H, "layers is 0"),
    ],
)
def test_what_cannot_be_searched_is_one_error(values: Any, layers: int, heads: int, said: str) -> None:
    runs = []

    def measure(gammas: np.ndarray) -> np.ndarray:
        runs.append(gammas)
        return values(len(runs))

    with pytest.raises(ConfigError, match=said):
        tune(ZeroTuningSearch(), measure, layers, heads)
