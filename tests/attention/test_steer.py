"""Steering: scores of pictures rise and those of the system prompt fall, by a part of themselves."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention.attend import mask_codes
from rave_jax.batch import Kind, Role
from rave_jax.config import ConfigError
from rave_jax.kernels.attention.base import tile_allow
from tests.attention.packed import DIMS, KEY, ROWS, attend, everything, features, info_of, normalised, outputs

PARTS = {"abs": np.abs, "score": lambda s: s, "one": np.ones_like}


def by_hand(config: at.Steer, x: at.Features, info) -> np.ndarray:
    """The attention map: PAI writes `s[img] = |s[img]| * alpha + s[img]` for rows that predict the answer."""
    k = np.repeat(np.float64(x.k), 2, axis=2)
    s = np.einsum("BTHh,BSHh->BTHS", np.float64(x.q), k) * DIMS.head_dim**-0.5
    kind, role = np.asarray(info.kind), np.asarray(info.role)
    part = PARTS[config.by](s)
    visual = (kind == Kind.VISUAL)[:, None, None]
    system = ((kind == Kind.TEXT) & (role == Role.SYSTEM))[:, None, None]
    rows = (role == Role.RESPONSE)[:, :, None, None] if config.rows == "response" else True
    s = s + np.where(rows, config.image * part * visual - config.system * part * system, 0)
    allow = np.asarray(tile_allow(mask_codes([], info, info, at.causal_codes(info))))[:, 0, 0, :, None]
    return normalised(np.where(allow, np.exp(s), 0.0))


@pytest.mark.parametrize("which", ["reference", "xla"])
@pytest.mark.parametrize(
    "config",
    [at.Steer(image=0.7), at.Steer(image=0.4, system=0.6, by="score", rows="all"), at.Steer(image=0.5, by="one")],
    ids=["PAI", "AVAR", "one"],
)
def test_it_is_the_stated_formula(config: at.Steer, which: str) -> None:
    x, info = features(), info_of(*ROWS)
    out, rows, _ = everything((config,), x, info, x.q, which)
    expected = by_hand(config, x, info)
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    np.testing.assert_allclose(out, outputs(expected, x), atol=1e-5)


def test_strengths_of_zero_change_no_bit() -> None:
    x, info = features(), info_of(*ROWS)
    mechanisms = at.build_mechanisms((at.Steer(),), DIMS, KEY)
    found, plain = (jax.jit(lambda x, m=m: attend(x, info, m).out)(x) for m in (mechanisms, []))
    np.testing.assert_array_equal(found, plain)


def test_it_adds_to_gates_of_the_layer_and_one_alone_reads_the_score() -> None:
    gates = at.Rave(rank=2, start="random"), at.Rave(rank=2, form="tanh", queries="text", start="random")
    at.build_mechanisms((*gates, at.Steer(image=0.3), at.Steer(image=0.3, by="one")), DIMS, KEY)
    twice = at.Steer(image=0.3), at.Steer(image=0.3, by="score")
    with pytest.raises(ConfigError, match="Steer cannot stand twice in a layer: each adds a function of the score"):
        at.build_mechanisms(twice, DIMS, KEY)
    with pytest.raises(ConfigError, match=r"image is -1\.0, expected a number from 0 to 1000"):
        at.Steer(image=-1.0)
