"""Queries that are dealt out for context parallelism: with every mechanism, a whole model gives what it gives in the
order of rows. On one device, so that what is tried is the order alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.models.config import ModelOptions
from rave_jax.models.decoder import Decoder
from rave_jax.parallel import context
from tests.models.made import model as made
from tests.models.test_region_major import CONFIG, SETTINGS, both, outcome

TRIED = SETTINGS | {"pine": (at.Pine(3), at.Rave(rank=2, start="random"))}
FAST = ("sinks and losses", "gaze")


@pytest.fixture
def two_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows are dealt out as to two devices; gives what was done."""
    done: list[str] = []

    def moved(name: str, back: bool):
        def move(x: jax.Array) -> jax.Array:
            done.append(name)
            order = context.dealt_order(x.shape[1], 2)
            return jnp.take(x, np.argsort(order) if back else order, axis=1)

        monkeypatch.setattr(context, name, move)

    monkeypatch.setattr(context, "ways", lambda: 2)
    moved("deal", False)
    moved("gather_in", True)
    return done


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in TRIED])
def test_queries_that_are_dealt_out_change_nothing(name: str, two_ways: list[str], monkeypatch) -> None:
    vlm, (rows, _, _) = made(CONFIG, ModelOptions(TRIED[name])), both(None)
    found = jax.jit(lambda model, rows: outcome.__wrapped__(model, rows))(vlm, rows)
    assert {"deal", "gather_in"} <= set(two_ways)
    monkeypatch.setattr(Decoder, "_deals", lambda *_: False)
    expected = outcome(vlm, rows)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
    assert found[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        np.testing.assert_allclose(found[1][key], value, rtol=1e-4)
