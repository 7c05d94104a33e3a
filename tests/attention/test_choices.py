"""Sums over what queries choose, against loops over the choice of every query."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import entropy

from rave_jax.attention import BiFormer, Gaze, MechanismConfig, Moba, choices
from rave_jax.batch import Batch, Kind
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from tests.attention.test_gaze import LAYOUT, T, a_model, chosen_of, gaze, rows

FIGURES = ("read", "latest", "unused", "effective", "least_effective")


@jax.jit
def sums_of(model: Vlm, given: Batch) -> Any:
    found = model.forward(given, Want(choices=True)).choices
    return found, choices.figures(found)


def looped(chosen: np.ndarray, given: Batch, kinds: tuple[int, ...], top_k: int, most: int) -> dict[str, float]:
    """The figures, query by query. `chosen` [L,B,T,H,R]."""
    info = jax.tree.map(np.asarray, given.info)
    found: dict[str, list[Any]] = {name: [] for name in (*FIGURES[:4], "by layer")}
    for layer in chosen:
        shares = []
        for b, of_row in enumerate(layer):
            # A text query sees a region whole behind its last token, and a visual one up to its own token.
            last = {r: np.flatnonzero(info.region[b] == r).max() for r in set(info.region[b]) - {0}}
            documents = {r: info.document[b, at] for r, at in last.items()}
            before = {
                t: sorted((r for r in last if documents[r] == info.document[b, t] and last[r] <= t), key=last.get)
                for t in np.flatnonzero((info.document[b] > 0) & np.isin(info.kind[b], kinds))
            }
            measured = [t for t in before if len(before[t]) > top_k]
            some = min(most, len(measured))
            measured = [measured[n * len(measured) // some] for n in range(some)]
            for t in measured:
                found["read"].append(top_k / len(before[t]))
                picked = of_row[t][:, np.array(before[t][-top_k:]) - 1]
                assert (of_row[t].sum(-1) == top_k).all()
                found["latest"] += (picked.sum(-1) / top_k).tolist()
            for document in {info.document[b, t] for t in measured}:
                mine = [t for t in measured if info.document[b, t] == document]
                could = np.array(sorted({r for t in mine for r in before[t]})) - 1
                used = of_row[mine].sum(0)[:, could]
                found["unused"] += (used == 0).reshape(-1).tolist()
                shares += (np.exp(entropy(used, axis=-1)) / len(could)).tolist()
        found["effective"] += shares
        found["by layer"].append(np.mean(shares))
    least = min(found.pop("by layer"))
    return {name: np.mean(values) for name, values in found.items()} | {"least_effective": least}


VISUAL = (Kind.TEXT, Kind.VISUAL)


@pytest.mark.parametrize(
    ("config", "kinds", "most"),
    [
        pytest.param(gaze(), (Kind.TEXT,), 128, id="Gaze"),
        pytest.param(gaze(top_k=1), (Kind.TEXT,), 3, id="three of many"),
        pytest.param(BiFormer(LAYOUT, 16, top_k=1), VISUAL, 128, id="BiFormer", marks=pytest.mark.slow),
    ],
)
def test_figures_are_those_of_a_loop(
    config: Any, kinds: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "MEASURED", most)
    given, model = rows(), a_model(config)
    # Traced anew: the number is no part of what jit knows a program by.
    _, found = jax.jit(lambda model, given: sums_of.__wrapped__(model, given))(model, given)
    name = type(config).__name__
    wanted = looped(np.asarray(chosen_of(model, given)), given, kinds, config.top_k, most)
    assert set(found) == {f"{name}/{figure}" for figure in FIGURES}
    for figure, value in wanted.items():
        np.testing.assert_allclose(found[f"{name}/{figure}"], value, rtol=1e-5, err_msg=figure)
    assert wanted["read"] < wanted["effective"] < 1


def test_mechanisms_of_one_class_are_told_apart_by_their_first_layer() -> None:
    several: tuple[MechanismConfig, ...] = (gaze(layers=(0,)), gaze(top_k=1, layers=(1,)))
    found, _ = jax.eval_shape(sums_of, a_model(*several), rows())
    assert set(found) == {"Gaze/0", "Gaze/1"}


def test_without_a_choice_figures_are_not_numbers() -> None:
    _, found = sums_of(a_model(gaze(top_k=15)), rows())
    assert all(np.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    "config", [gaze(choice="soft_bias"), pytest.param(Moba(4, top_k=2), marks=pytest.mark.slow)], ids=["Gaze", "Moba"]
)
def test_losses_and_gradients_do_not_change_by_a_bit(config: Gaze | Moba) -> None:
    given, model = rows(), a_model(config)

    def learned(wanted: bool) -> Any:
        @jax.jit
        def run(model: Vlm) -> Any:
            def loss(model: Vlm) -> Any:
                out = model.forward(given, Want(losses=True, choices=wanted))
                return jnp.sum(jnp.where((given.info.document > 0)[..., None], out.hidden, 0.0) ** 2), out.choices

            return jax.value_and_grad(loss, has_aux=True)(model)

        (value, found), gradients = run(model)
        assert (found is None) == (not wanted)
        return value, gradients

    jax.tree.map(np.testing.assert_array_equal, learned(True), learned(False))
    assert T < choices.MEASURED
