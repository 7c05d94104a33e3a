"""ZeroTuning: four routes to one formula, beside other mechanisms, in packed rows, with heads of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax import config as machinery
from rave_jax.attention.zero_tuning import first_of
from rave_jax.config import ConfigError
from rave_jax.models.config import ModelOptions
from tests.attention.packed import DIMS, KEY, ROWS, B, T, dense_map, everything, features, info_of, outputs

ROUTES: tuple[Any, ...] = ("key_bias", "channel", "merge", "after")
BESIDE: dict[str, tuple[at.MechanismConfig, ...]] = {
    "alone": (),
    "with a gate and a window": (at.Rave(rank=4, start="random"), at.SlidingWindow(5)),
}
SOME = at.ZeroTuning(gamma=(0.2, 3.0, 1.0), heads=(3, 1, 0))
GAMMA = np.array([1.0, 3.0, 1.0, 0.2])


def stated(plain: np.ndarray, info: Any) -> np.ndarray:
    """a'_0 = gamma a_0 / D and a'_j = a_j / D with D = 1 + (gamma - 1) a_0, for the first token of each document."""
    changed, info = plain.copy(), jax.tree.map(np.asarray, info)
    for b, i in np.ndindex(plain.shape[:2]):
        start = i - int(info.offset[b, i])
        D = 1 + (GAMMA - 1) * plain[b, i, :, start]
        changed[b, i] = plain[b, i] / D[:, None]
        changed[b, i, :, start] = GAMMA * plain[b, i, :, start] / D
    return changed


@pytest.mark.parametrize(
    ("route", "beside"),
    [
        # The tests of slots have two of them beside others.
        pytest.param(route, beside, marks=[pytest.mark.slow] * (beside != "alone"))
        for route in ROUTES
        for beside in BESIDE
    ],
)
def test_every_route_is_the_stated_formula_with_the_gradients_of_the_first(beside: str, route: Any) -> None:
    x, info, others = features(), info_of(*ROWS), BESIDE[beside]
    ct = features(1).q
    wanted = stated(dense_map(others, x, info), info)
    out, rows, gradients = everything((*others, dataclasses.replace(SOME, route=route)), x, info, ct)
    np.testing.assert_allclose(out, outputs(wanted, x), atol=1e-5)
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    first = everything((*others, SOME), x, info, ct, "reference")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, first[2])


@pytest.mark.parametrize("route", ROUTES)
def test_a_packed_row_equals_its_documents_alone(route: Any) -> None:
    x, config = features(), (dataclasses.replace(SOME, route=route),)
    packed = everything(config, x, info_of(*ROWS), x.q)[0]
    for b, documents in enumerate(ROWS):
        start = 0
        for document in documents:
            n = len(document)
            one = jax.tree.map(lambda a, b=b, s=start: np.roll(a[b : b + 1], -s, axis=1).repeat(B, axis=0), x)
            alone = everything(config, one, info_of((document,), (document,)), x.q)[0]
            np.testing.assert_allclose(packed[b, start : start + n], alone[0, :n], atol=1e-6)
            start += n


@pytest.mark.parametrize("route", ROUTES)
def test_one_changes_no_bit(route: Any) -> None:
    x, info = features(), info_of(*ROWS)
    plain, neutral = (everything(configs, x, info, x.q) for configs in ((), (at.ZeroTuning(route=route),)))
    jax.tree.map(np.testing.assert_array_equal, neutral, plain)


def test_factors_of_several_multiply_except_of_two_that_own_the_key() -> None:
    x, info = features(), info_of(*ROWS)
    twice = everything((at.ZeroTuning(2.0), at.ZeroTuning(0.3, route="merge")), x, info, x.q)
    mixed = everything((at.ZeroTuning(0.3, route="after"), at.ZeroTuning(2.0, route="channel")), x, info, x.q)
    once = everything((at.ZeroTuning(0.6),), x, info, x.q)
    split = everything((at.ZeroTuning(2.0, route="merge"), at.ZeroTuning(0.3, route="after")), x, info, x.q)
    for several in (twice, mixed, split):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), several, once)
    with pytest.raises(ConfigError, match="ZeroTuning cannot stand twice in a layer: each changes the weight of a key"):
        at.build_mechanisms((at.ZeroTuning(2.0, route="after"), at.ZeroTuning(3.0, route="after")), DIMS, KEY)


def test_the_first_token_of_a_document_is_found_among_the_keys() -> None:
    info = info_of(*ROWS)
    assert first_of(info.document, info).tolist() == [
        [0] * 8 + [8] * 3 + [11] * 3 + [0] * 2,
        [0] * 7 + [7] * 7 + [0] * 2,
    ]
    # A cache: entries that hold nothing are all zeros, and are no first tokens.
    held = jax.tree.map(lambda code: code[1:, :5].at[:, 4:].set(0), info)
    assert first_of(info.document[1:, 3:4], held).tolist() == [[0]]


def test_a_table_of_gammas_survives_its_json() -> None:
    options = ModelOptions(mechanisms=(SOME, at.ZeroTuning(gamma=2.0, layers=(1,), route="after")))
    assert machinery.loads(ModelOptions, machinery.dumps(options)) == options


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": (1.0, float("inf")), "heads": (0, 1)}, "gamma"),
        ({"gamma": (1.0, 2.0), "heads": (1,)}, "gamma"),
        ({"gamma": (1.0, 2.0)}, "gamma"),
        ({"gamma": 1e-8, "route": "after"}, "gamma"),  # a row that sees its first token alone would be 0 / 0
        ({"gamma": (2.0, 1e39), "heads": (0, 1), "route": "after"}, "gamma"),
        ({"gamma": 2.0, "route": "before"}, "route"),
        ({"heads": (4,)}, "heads"),
        ({"heads": (1, 1)}, "heads"),
    ],
)
def test_bad_configs_name_the_field(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        at.ZeroTuning(**bad).build(DIMS, KEY)


assert T == 16, "the rows above are laid out for it"
